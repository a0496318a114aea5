"""What people ask a model for, one call each, over `generate`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import to_host
from keras_paligemma.models.inputs import prompt_batch
from keras_paligemma.models.inputs import typed
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
    samples: int = 1,
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
        samples: int, answers to each prompt, whose objects are merged. For
            more than one compile the model with a sampler that draws.
        overlap: float, intersections over union above it are one object, of
            which the surest stays. `None` merges objects of several samples
            at 0.5, and takes those of one as they are.
        score: function of the log-probabilities of an object's locations and
            label; see `tasks.scores`.
        **options: as `generate` takes them: `max_new_tokens`, `batch_size`.

    Returns:
        `Objects` of the picture, each with its score; for a list of pictures
        a list. What the answers hold besides, such as objects of labels that
        were not asked for, is in `skipped`.

    Raises:
        ValueError: a label is empty, or holds what separates labels; or
            samples would all be the same.

    Example:

    ```python
    model.detect("farm.jpg", ["cow", "horse"])[0].xyxy((480, 640))
    ```
    """
    return _find(
        *(model, images, labels, prompts.detect, None),
        *(one_by_one, samples, overlap, score, options),
    )


def segment(
    model: keras.Model,
    images: Any,
    labels: str | Sequence[str] | Sequence[Sequence[str]],
    codec: MaskCodec | None = None,
    *,
    one_by_one: bool = False,
    samples: int = 1,
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
        *(one_by_one, samples, overlap, score, options),
    )


def _find(
    model,
    images,
    labels,
    prompt_of,
    codec,
    one_by_one,
    samples,
    overlap,
    score,
    options,
):
    """Ask for objects, and read and merge what the answers hold."""
    if samples < 1 or (samples > 1 and _is_greedy(model)):
        raise ValueError(
            "Several samples need a sampler that draws. Expected: samples=1, "
            "or a model that was compiled with sampler='top_p' or the like. "
            f"Received: samples={samples}, {type(model.sampler).__name__}."
        )
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
    for _ in range(samples):
        answers = answers_with_log_probabilities(model, inputs, options)
        for (row, some), answer in zip(asked, answers, strict=True):
            found[row].append(_read(answer, some, codec, score))
    if overlap is None and samples > 1:
        overlap = 0.5
    merged = [
        _merged(parts, picture, overlap)
        for parts, picture in zip(found, pictures, strict=True)
    ]
    return merged if several else merged[0]


def _read(answer, labels, codec, score):
    """The objects of one answer; one that has no label has the asked one."""
    tokens, log_probabilities = answer
    objects = read_objects(
        tokens, codec, [*labels, ""], None, log_probabilities, score
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


def _is_greedy(model):
    return type(model.sampler).__name__ in ("GreedySampler", "BeamSampler")


def answers_with_log_probabilities(
    model: keras.Model, inputs: dict, options: dict
) -> list[tuple[list[str], np.ndarray]]:
    """Answer prompts, and tell how sure the model was of each token.

    The answers are read once more by the model, without a cache, since
    `generate` gives text alone.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        inputs: dict of lists `images` and `prompts`.
        options: dict of keyword arguments of `generate`.

    Returns:
        Of each prompt the tokens of the answer as text, without the one that
        ends it, and their log-probabilities.
    """
    texts = model.generate(inputs, **options)
    preprocessor, size = model.preprocessor, options.get("batch_size")
    rows = preprocessor.tokenizer.tokenize(texts)
    longest = max(map(len, rows), default=0) + 1
    step = size or len(rows)
    found = []
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        some = {name: values[part] for name, values in inputs.items()}
        arrays = preprocessor.generate_preprocess(
            some | {"responses": texts[part]}, max_new_tokens=longest
        )
        values = _log_probabilities(model, arrays)
        for row, each in zip(rows[part], values, strict=True):
            pieces = texts_of(preprocessor.tokenizer, row)
            found.append((pieces, each[: len(row)]))
    return found


def _log_probabilities(model, arrays):
    """Log-probabilities of the response tokens (B, R)."""
    backbone = model.backbone
    config = backbone.text_config
    arrays, _ = prompt_batch(arrays, backbone.image_size, config)
    written = np.flatnonzero(arrays["response_mask"].any(0))
    if not written.size:
        return np.zeros((len(arrays["token_ids"]), 0))
    # Responses begin at one index in every row.
    start, end = written[0], arrays["token_ids"].shape[1]
    targets_BR = arrays["token_ids"][:, start:end]
    with model.turns:
        hidden_BLD = backbone(typed(arrays, config.vocabulary_size))
        hidden_BRD = hidden_BLD[:, start - end - 1 : -1]
        logits_BRV = backbone.logits(hidden_BRD)
        values_BRV = ops.log_softmax(ops.cast(logits_BRV, "float32"))
        values_BR1 = ops.take_along_axis(
            values_BRV, ops.expand_dims(targets_BR, -1), axis=-1
        )
        return np.minimum(to_host(values_BR1)[..., 0], 0)


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
