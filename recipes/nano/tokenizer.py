"""Train the nano preset's SentencePiece model.

The settings are those of Gemma's tokenizer at a small size. Text is not
normalized, unknown characters fall back to bytes, and every digit is a piece.
An English word of the tasks is one piece, and a noun of another language
consists of a few. The first 896 pieces are learned. 1024 location and 128
segmentation pieces follow, 2048 in all.

Run it from the repository's root:
`python -m recipes.nano.tokenizer [--cache FOLDER] [--output FILE]`.
"""

import argparse
import io
import re
import string
from pathlib import Path

import numpy as np
import sentencepiece as spm

from keras_paligemma.preprocessing.tokenizer import (
    append_location_and_segment_pieces,
)
from recipes.nano import languages
from recipes.nano import scenes
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import DEFAULT_CACHE
from recipes.nano.fetch import read_labels

OUTPUT = (
    Path(__file__).parents[2]
    / "presets/pali_gemma2_nano_112"
    / "tokenizer.model"
)

LEARNED_PIECES = 896

# The number of examples of each task in the corpus, and the number of copies of
# each class's name. They outweigh the free text, so that every word of the
# tasks becomes one piece.
EXAMPLES = 3000
NAME_COPIES = 500

# Words of captions and prompts. Like the classes' names, they should be single
# pieces at the start of a text too.
TASK_WORDS = ["caption", "detect", "answer", "segment", "describe"] + [
    "en",
    "how",
    "many",
    "and",
    "a",
    "an",
    "the",
    "what",
    "is",
    "in",
]

# The number of captions in each of the other languages.
TRANSLATIONS = 6000

# Free text has one sentence for each combination of these.
SUBJECTS = ["The boy", "A woman", "My friend", "The old man", "She", "He"]
VERBS = ["sees", "likes", "has", "wants", "looks at", "finds", "draws"]
OBJECTS = [
    "a red ball on the table.",
    "the small picture of a house.",
    "two of them near the water.",
    "something good to eat.",
    "a blue thing with white stripes.",
    "the green one, not the yellow one.",
    "many people in the street.",
    "a black box under the chair.",
]
QUESTIONS = [
    "What is in the picture?",
    "What colour is it?",
    "Where is the big one?",
    "Is there anything on the left?",
    "Which of these are on the right side?",
    "Can you describe this image?",
    "How many of them are there?",
    "Who is there, and what are they doing?",
]


def task_texts(rng):
    """Return prompts and responses of the tasks, without location tokens."""
    classes = list(CLASSES)
    texts = []
    for task, example in scenes.TASKS.items():
        for _ in range(EXAMPLES):
            names = scenes.choose_names(task, rng, classes, max_objects=5)
            # The text does not depend on the objects' positions.
            objects = [scenes.Placed(name, (0, 0, 1, 1)) for name in names]
            prompt, response = example(rng, objects, classes, size=1)
            texts += [prompt, re.sub("<loc[0-9]{4}>", "", response)]
    return texts


def translations(rng):
    """Return prompts and captions in the languages other than English."""
    classes = list(CLASSES)
    return [
        text
        for language in languages.TRANSLATED
        for _ in range(TRANSLATIONS)
        for text in (
            f"caption {language}",
            languages.caption(
                scenes.draw(rng, classes, rng.integers(1, 4)), language
            ),
        )
    ]


def corpus(labels):
    """Return the texts that the pieces are learned from.

    Args:
        labels: list of str, English names of all kinds of things.

    Returns:
        list of str.
    """
    words = [*CLASSES, *TASK_WORDS]
    sentences = [
        f"{subject} {verb} {thing}"
        for subject in SUBJECTS
        for verb in VERBS
        for thing in OBJECTS
    ]
    return (
        task_texts(np.random.default_rng(0))
        + (words + [f" {word}" for word in words]) * NAME_COPIES
        + translations(np.random.default_rng(1))
        + labels
        + sentences
        + QUESTIONS * 10
    )


def train(texts):
    """Learn the first pieces.

    Args:
        texts: list of str.

    Returns:
        The bytes of a SentencePiece model of `LEARNED_PIECES` pieces.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        # Gemma's names of the special pieces, which other packages look up.
        bos_piece="<bos>",
        eos_piece="<eos>",
        vocab_size=LEARNED_PIECES,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        # Plain English text and captions never need bytes.
        required_chars=string.ascii_letters
        + string.digits
        + string.punctuation
        + "".join(sorted(letters_of_captions())),
        character_coverage=0.9999,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def letters_of_captions():
    """Return the letters of the captions in all languages as a set."""
    texts = [
        languages.caption([name, name, name], language)
        for name in CLASSES
        for language in languages.LANGUAGES
    ]
    return set("".join(texts)) - {" "}


def split_words(model_bytes):
    """Return the words of the tasks that are split into several pieces.

    Args:
        model_bytes: bytes, serialised SentencePiece model.

    Returns:
        list of str, words with or without a preceding space.
    """
    tokenizer = spm.SentencePieceProcessor(model_proto=model_bytes)
    words = [*CLASSES, *TASK_WORDS]
    return [
        text
        for word in words
        for text in (word, f" {word}")
        if len(tokenizer.encode(text)) != 1
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    texts = corpus(read_labels(arguments.cache))
    model_bytes = append_location_and_segment_pieces(train(texts))
    split = split_words(model_bytes)
    if split:
        raise RuntimeError(f"These words are not single pieces: {split}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(model_bytes)
    print(arguments.output)


if __name__ == "__main__":
    main()
