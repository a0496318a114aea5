"""What people ask a model for, one call each, over `generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from keras_paligemma.generation.answer import Answer
from keras_paligemma.tasks import prompts
from keras_paligemma.tasks.answers import Score
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Objects
from keras_paligemma.tasks.scores import box_and_label
from keras_paligemma.tasks.scores import suppress


def caption(
    model: keras.Model, images: Any, lang: str = "en", **options
) -> str | list[str]:
    """Describe pictures in a sentence.

    Args:
        images: a picture, as `generate` takes it, or a list of them.
        lang: str, a language of `tasks.prompts.LANGUAGES`.
        **options: as `generate` takes them: `max_new_tokens`, `batch_size`.

    Returns:
        str; for a list of pictures a list.

    Raises:
        ValueError: the models know no such language.

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
        images: a picture, as `generate` takes it, or a list of them.
        questions: str, or a list: one a picture, or several of one picture.
        lang: str, the language of questions and answers.
        **options: as `generate` takes them.

    Returns:
        str; a list where there are several pictures or questions.

    Raises:
        ValueError: a question is empty, there are not as many as pictures, or
            the models know no such language.

    Example:

    ```python
    model.ask("farm.jpg", ["how many cows?", "what is the weather?"])
    ```
    """
    if isinstance(questions, str):
        prompt = prompts.answer(questions, lang)
    else:
        prompt = [prompts.answer(one, lang) for one in questions]
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
    """Find the objects of some kinds in pictures.

    Args:
        images: a picture, as `generate` takes it, or a list of them.
        labels: str or list of them, to look for in all pictures; or a list
            of lists, one a picture.
        one_by_one: bool, ask for each label by a prompt of its own, as models
            want it that learned from such prompts alone; else for all at once.
        overlap: float; the objects of all samples or beams that the options
            ask for are taken together, and of those whose intersection over
            union is above it the surest stays. `None` takes one answer: of
            samples the likeliest, of beams the best.
        score: function of the log-probabilities of an object's locations and
            label; see `tasks.scores`.
        **options: as `generate` takes them: `max_new_tokens`, `batch_size`,
            `num_samples`, `temperature`, `beams`.

    Returns:
        `Objects` of the picture, each with its score; for a list of pictures
        a list. What the answers hold besides, such as objects of labels that
        were not asked for, is in `skipped`.

    Raises:
        ValueError: a label is empty, or holds what separates labels.

    Example:

    ```python
    model.detect("farm.jpg", ["cow", "horse"])[0].xyxy((480, 640))
    drawn = {"num_samples": 8, "temperature": 1.0}
    model.detect("farm.jpg", "cow", overlap=0.5, **drawn)
    ```
    """
    return _find(
        *(model, images, labels, prompts.detect, None),
        *(one_by_one, overlap, score, options),
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
    """Find the objects of some kinds in pictures, with their masks.

    Args:
        codec: `MaskCodec` whose codes the model learned. `None` takes the one
            of the nano preset; published models know the codes of
            `MaskCodec.load("vae-oid.npz")`.

    The other arguments, what is returned and the errors are those of
    `detect`. An object whose codes are no mask has its box alone.

    Example:

    ```python
    model.segment("farm.jpg", "cow", codec)[0].mask_in((480, 640))
    ```
    """
    return _find(
        *(model, images, labels, prompts.segment),
        *(codec or MaskCodec.embedded(),),
        *(one_by_one, overlap, score, options),
    )


def _find(
    model, images, labels, prompt_of, codec, one_by_one, overlap, score, options
):
    """Ask for objects, and read and merge what the answers hold."""
    several = _is_several(images)
    pictures = list(images) if several else [images]
    asked = [
        (row, some)
        for row, names in enumerate(_labels_of(labels, len(pictures)))
        for some in ([[name] for name in names] if one_by_one else [names])
    ]
    inputs = {
        "images": [pictures[row] for row, _ in asked],
        "prompts": [prompt_of(some) for _, some in asked],
    }
    found = [[] for _ in pictures]
    answers = model.generate(inputs, details=True, **options)
    tokenizer = model.preprocessor.tokenizer
    for (row, some), answer in zip(asked, answers, strict=True):
        found[row] += [
            _read(one, tokenizer, some, codec, score)
            for one in _candidates(answer, overlap is not None)
        ]
    merged = [
        _merged(parts, picture, overlap)
        for parts, picture in zip(found, pictures, strict=True)
    ]
    return merged if several else merged[0]


def _candidates(answer, every):
    """All answers to a prompt, of samples or beams, or the likeliest one."""
    if isinstance(answer, Answer):
        return (every and answer.beams) or [answer]
    return answer if every else [max(answer, key=lambda x: x.log_probability)]


def _read(answer, tokenizer, labels, codec, score):
    """The objects of one answer; one that has no label has the asked one."""
    # What ended the answer is no part of its last label.
    count = len(answer.token_ids) - (answer.finish == "stop_token")
    objects = read_objects(
        texts_of(tokenizer, answer.token_ids[:count]),
        codec,
        [*labels, ""],
        None,
        answer.log_probabilities[:count],
        score,
    )
    if len(labels) > 1:
        return objects
    named = [
        one if one.label else dataclasses.replace(one, label=labels[0])
        for one in objects
    ]
    return dataclasses.replace(objects, items=named)


def _merged(parts, picture, overlap):
    """The objects of all answers about a picture as those of one."""
    items = [one for part in parts for one in part]
    return Objects(
        items if overlap is None else suppress(items, overlap),
        [one for part in parts for one in part.skipped],
        prompts.SEPARATOR.join(part.answer for part in parts if part.answer),
        picture,
    )


def _generate(model, images, prompt, options):
    """Answer one prompt about each picture, or one each."""
    if _is_several(images):
        images = list(images)
        prompt = [prompt] * len(images) if isinstance(prompt, str) else prompt
    elif not isinstance(prompt, str):
        images = [images] * len(prompt)
    return model.generate({"images": images, "prompts": prompt}, **options)


def _is_several(images):
    """Whether these are pictures, not one."""
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4


def _labels_of(labels, count):
    """The labels to look for in each picture."""
    labels = [labels] if isinstance(labels, str) else list(labels)
    if not labels or isinstance(labels[0], str):
        return [labels] * count
    if len(labels) != count:
        raise ValueError(
            "Lists of labels go with pictures. Expected: one a picture, "
            f"{count}. Received: {len(labels)}."
        )
    return [list(some) for some in labels]


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Give the text of each token, which joined are the text of all.

    Args:
        tokenizer: `PaliGemmaTokenizer`.
        ids: ints.

    Returns:
        List of str. Of a character of several byte tokens the first has the
        text, the others none.
    """
    until = tokenizer.detokenize([list(ids[: i + 1]) for i in range(len(ids))])
    pieces, said, waiting = [""] * len(ids), 0, None
    for i, text in enumerate(until):
        waiting = i if waiting is None else waiting
        # A character that is not complete is shown as this one.
        if text.endswith("\ufffd") and i + 1 < len(until):
            continue
        pieces[waiting], said, waiting = text[said:], len(text), None
    return pieces
