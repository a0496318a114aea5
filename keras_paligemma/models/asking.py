"""The model's task methods, such as `caption` and `detect`."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import keras

from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.texts import texts_of
from keras_paligemma.generation.texts import up_to
from keras_paligemma.preprocessing.inputs import to_pictures
from keras_paligemma.tasks import prompts
from keras_paligemma.tasks.answers import Score
from keras_paligemma.tasks.answers import read_requested
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Objects
from keras_paligemma.tasks.published_codecs import mask_codec
from keras_paligemma.tasks.scores import box_and_label
from keras_paligemma.tasks.scores import check_overlap
from keras_paligemma.tasks.scores import suppress
from keras_paligemma.tasks.scores import with_neighbours


def caption(
    model: keras.Model, images: Any, lang: str = "en", **options
) -> str | list[str]:
    """Describe pictures in a sentence.

    Args:
        images: a picture, as `generate` takes it, or a list of pictures.
        lang: str, a language of `tasks.prompts.LANGUAGES`.
        **options: as `generate` takes them: `max_new_tokens`, `batch_size`.

    Returns:
        str; a list of str for a list of pictures.

    Raises:
        ValueError: if `lang` is not a supported language.

    Example:

    ```python
    model.caption("cat.jpg", lang="fr")
    ```
    """
    return _generate(model, images, prompts.caption(lang), options)


def ocr(model: keras.Model, images: Any, **options) -> str | list[str]:
    """Read the text in pictures.

    Args and Returns are those of `caption`, without the language.
    """
    return _generate(model, images, prompts.ocr(), options)


def ask(
    model: keras.Model,
    images: Any,
    questions: str | Sequence[str],
    lang: str = "en",
    **options,
) -> str | list[str]:
    """Answer questions about pictures.

    Args:
        images: a picture, as `generate` takes it, or a list of pictures.
        questions: str or list of str: one per picture, or several about one
            picture.
        lang: str, the language of questions and answers.
        **options: as `generate` takes them.

    Returns:
        str; a list of str for several pictures or questions.

    Raises:
        ValueError: if a question is empty, the numbers of questions and
            pictures differ, or `lang` is not a supported language.

    Example:

    ```python
    model.ask("farm.jpg", ["how many cows?", "what is the weather?"])
    ```
    """
    if isinstance(questions, str):
        prompt = prompts.answer(questions, lang)
    else:
        prompt = [prompts.answer(question, lang) for question in questions]
    return _generate(model, images, prompt, options)


def detect(
    model: keras.Model,
    images: Any,
    labels: str | Sequence[str] | Sequence[Sequence[str]],
    *,
    one_by_one: bool = False,
    overlap: float | None = None,
    score: Score = box_and_label,
    **options,
) -> Objects | list[Objects]:
    """Detect objects of the given labels in pictures.

    Args:
        images: a picture, as `generate` takes it, or a list of pictures.
        labels: str or list of str, searched for in all pictures; or a list
            of lists, one per picture.
        one_by_one: bool, whether to ask for each label in a prompt of its
            own, for models trained on single-label prompts; otherwise one
            prompt holds all labels.
        overlap: float, intersection over union. The objects of all samples or
            beams are merged: of those that overlap by more, the one with the
            highest score is kept. `None` uses one answer: the likeliest
            sample, or the best beam.
        score: function from the log-probabilities of an object's locations
            and label to its score; see `tasks.scores`. Scores rank objects: a
            good box may have 0.02.
        **options: as `generate` takes them: `max_new_tokens`, `batch_size`,
            `num_samples`, `temperature`, `beams`. With `alternatives=32`,
            neighbouring locations count too, and scores are higher and rank
            better; see `tasks.scores.with_neighbours`.

    Returns:
        `Objects` with scores; a list of `Objects` for a list of pictures. All
        other parts of the answers, such as objects of labels that were not
        requested, are in `skipped`.

    Raises:
        ValueError: if a label is empty or contains a separator of labels.

    Example:

    ```python
    model.detect("farm.jpg", ["cow", "horse"])[0].xyxy((480, 640))
    drawn = {"num_samples": 8, "temperature": 1.0}
    model.detect("farm.jpg", "cow", overlap=0.5, **drawn)
    ```
    """
    return _find(
        model, images, labels, None, one_by_one, overlap, score, options
    )


def segment(
    model: keras.Model,
    images: Any,
    labels: str | Sequence[str] | Sequence[Sequence[str]],
    codec: MaskCodec | None = None,
    *,
    one_by_one: bool = False,
    overlap: float | None = None,
    score: Score = box_and_label,
    **options,
) -> Objects | list[Objects]:
    """Detect objects in pictures and segment them.

    Args:
        codec: `MaskCodec` whose codes the model was trained on. Models of
            published sizes need one, usually
            `MaskCodec.load("vae-oid.npz")`. `None` uses that of the nano
            preset for others.

    The other arguments, the return value and the errors are those of
    `detect`. An object whose codes do not form a mask has only its box;
    `legal_objects=True` prevents that.

    Example:

    ```python
    model.segment("farm.jpg", "cow", codec)[0].mask_in((480, 640))
    ```
    """
    if isinstance(codec, (str, PurePath)):
        raise ValueError(
            "A codec is read first. Expected: "
            f"codec=MaskCodec.load({str(codec)!r}). Received: its path."
        )
    codec = codec or mask_codec(model.backbone.text_config.hidden_dim)
    return _find(
        model, images, labels, codec, one_by_one, overlap, score, options
    )


def _find(model, images, labels, codec, one_by_one, overlap, score, options):
    """Generate, parse and merge answers; with a codec, objects have masks."""
    if "details" in options:
        raise ValueError(
            "Objects are returned, not answers. Received: "
            f"details={options['details']!r}. Expected: no `details`, or "
            "`generate(…, details=True)` with a prompt of `tasks.prompts`."
        )
    if overlap is not None:
        check_overlap(overlap)
    pictures, several = to_pictures(images)
    asked = [
        (row, wanted)
        for row, names in enumerate(_labels_of(labels, len(pictures)))
        for wanted in ([[name] for name in names] if one_by_one else [names])
    ]
    prompt_of = prompts.detect if codec is None else prompts.segment
    inputs = {
        "images": [pictures[row] for row, _ in asked],
        "prompts": [prompt_of(wanted) for _, wanted in asked],
    }
    found = [[] for _ in pictures]
    # The length of an answer's text says where a stop string has cut it.
    options = options | {"strip_prompt": True}
    answers = model.generate(inputs, details=True, **options)
    tokenizer = model.preprocessor.tokenizer
    for (row, wanted), answer in zip(asked, answers, strict=True):
        found[row] += [
            _read(candidate, tokenizer, wanted, codec, score)
            for candidate in _candidates(answer, overlap is not None)
        ]
    merged = [
        _merged(parts, picture, overlap)
        for parts, picture in zip(found, pictures, strict=True)
    ]
    return merged if several else merged[0]


def _candidates(answer, every):
    """Return all samples or beams of a prompt, or only the likeliest."""
    if isinstance(answer, Answer):
        return (every and answer.beams) or [answer]
    return answer if every else [max(answer, key=lambda x: x.log_probability)]


def _read(answer, tokenizer, labels, codec, score):
    """Return the objects of an answer."""
    # The token that ended the answer is not part of its last label.
    count = len(answer.token_ids) - (answer.finish == "stop_token")
    tokens = texts_of(tokenizer, answer.token_ids[:count])
    tokens = up_to(tokens, len(answer.text))
    count = len(tokens)
    values = answer.log_probabilities[:count]
    if answer.alternatives:
        alternatives = [
            [(other.text, other.log_probability) for other in place]
            for place in answer.alternatives[:count]
        ]
        values = with_neighbours(tokens, values, alternatives)
    return read_requested(tokens, labels, codec, values, score)


def _merged(parts, picture, overlap):
    """Merge the objects of all answers about a picture."""
    items = [item for part in parts for item in part]
    return Objects(
        items if overlap is None else suppress(items, overlap),
        [fragment for part in parts for fragment in part.skipped],
        prompts.SEPARATOR.join(part.answer for part in parts if part.answer),
        picture,
    )


def _generate(model, images, prompt, options):
    """Answer one prompt about each picture, or one prompt per picture."""
    pictures, several = to_pictures(images)
    if several:
        images = pictures
        prompt = [prompt] * len(images) if isinstance(prompt, str) else prompt
    elif not isinstance(prompt, str):
        images = pictures * len(prompt)
    return model.generate({"images": images, "prompts": prompt}, **options)


def _labels_of(labels, count):
    """Return the labels to search for in each picture."""
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels or isinstance(labels[0], str):
        return [labels] * count
    if len(labels) != count:
        raise ValueError(
            "Lists of labels go with pictures. Expected: one a picture, "
            f"{count}. Received: {len(labels)}."
        )
    return [
        [wanted] if isinstance(wanted, str) else list(wanted)
        for wanted in labels
    ]
