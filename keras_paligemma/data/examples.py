"""Validate and read single examples, and locate their errors."""

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.preprocessing.inputs import DROPPED
from keras_paligemma.preprocessing.inputs import check_no_special_tokens
from keras_paligemma.preprocessing.inputs import plain_prompts
from keras_paligemma.preprocessing.inputs import to_strings

# Looks like a location or mask token, but is not one.
_NO_TOKEN = re.compile(
    r"<loc(?!(?:0\d{3}|10[01]\d|102[0-3])>)-?\d+>"
    r"|<seg(?!(?:0\d{2}|1[01]\d|12[0-7])>)-?\d+>"
)
# A box that is not part of a longer row of locations.
_BOX = re.compile(r"(?<!<loc\d{4}>)" + r"<loc(\d{4})>" * 4 + r"(?!<loc)")
# Tokens in a row, with or without spaces between them.
_ROW = re.compile(r"<(?:loc|seg)\d+>(?:\s*<(?:loc|seg)\d+>)*")
# A valid row in an answer about objects: a box, or a box and its mask.
_OBJECT = re.compile(r"(?:<loc\d{4}>){4}(?:(?:<seg\d{3}>){16})?")
_ASKS_FOR_OBJECTS = re.compile(
    r"(?:<image>|<bos>|\s)*(?:detect|segment)\b", re.IGNORECASE
)

SAME_FRAMES = (
    "Expected: the same number of pictures in all examples, as the arrays of "
    "a batch have one shape. Put examples of another number into a data set "
    "of their own."
)


class ExampleError(ValueError):
    """An invalid example; the message begins with its place.

    Args:
        message: str.
        remainder: dict, the example without its invalid objects, if the rest
            can be used; `Batches` with `skip_errors=True` uses it.
    """

    def __init__(
        self, message: str, remainder: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.remainder = remainder


@contextlib.contextmanager
def located(place: str):
    """Prefix the messages of exceptions with the place of an example.

    Args:
        place: str, such as `"train.jsonl, line 3"`.

    Raises:
        ExampleError: for any exception raised inside. An `ExampleError`
            already has a place and passes unchanged, as does a `MemoryError`,
            which is not caused by the example.

    Example:

    ```python
    with located("train.jsonl, line 3"):
        raise ValueError("`suffix` is empty.")
    # ExampleError: train.jsonl, line 3: `suffix` is empty.
    ```
    """
    try:
        yield
    except (ExampleError, MemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        message = f"{kind}: {error}" if kind else str(error)
        raise ExampleError(f"{place}: {message}") from error


def where(source: Any, index: int) -> str:
    """Return the place of an example in words.

    Args:
        source: a source; `source.where(index)` is used if it has one.
        index: int.

    Returns:
        str, for lists and the like `"example 3"`, counted from 0.
    """
    name = getattr(source, "where", None)
    return f"example {index}" if name is None else name(index)


def answers_of(example: dict[str, Any]) -> list[str]:
    """Return the answers of an example, one or several.

    Args:
        example: dict with `responses`.

    Returns:
        list of at least one string.

    Raises:
        ValueError: if there is no answer; an answer has an invalid location,
            which would be tokenized as letters, or a box with reversed edges;
            or, for the prompts `detect …` and `segment …`, its rows of tokens
            are neither a box nor a box and a mask, or contain spaces. Answers
            to other prompts may contain any tokens, such as points.

    Example:

    >>> example = {"images": "a.jpg", "prompts": "ocr", "responses": "a cat"}
    >>> answers_of(example)
    ['a cat']
    """
    missing = {"images", "prompts", "responses"} - set(example)
    if missing:
        raise ValueError(
            "The example lacks a part. Expected: 'images', 'prompts' and "
            f"'responses'. Received: {sorted(example)}."
        )
    answers = example["responses"]
    answers = list(answers) if isinstance(answers, (list, tuple)) else [answers]
    if not answers:
        raise ValueError("There is no answer. Expected: one or more strings.")
    prompt = example["prompts"]
    objects = isinstance(prompt, str) and _ASKS_FOR_OBJECTS.match(prompt)
    for answer in answers:
        if isinstance(answer, str):
            _check_places(answer)
            if objects:
                _check_objects(answer)
    return answers


def _check_places(answer):
    """Raise on invalid locations and boxes with reversed edges."""
    wrong = _NO_TOKEN.search(answer)
    if wrong:
        raise ValueError(
            "A place or mask is outside of its range. Expected: <loc0000> "
            "to <loc1023>, of which a box has four (y1, x1, y2, x2), and "
            f"<seg000> to <seg127>. Received: {wrong[0]!r:.40}."
        )
    for box in _BOX.finditer(answer):
        y1, x1, y2, x2 = map(int, box.groups())
        if y1 > y2 or x1 > x2:
            raise ValueError(
                "A box is upside down. Expected: (y1, x1, y2, x2), the "
                f"upper left corner first. Received: {box[0]!r}."
            )


def _check_objects(answer):
    """Raise on tokens that are neither a box nor a box and its mask."""
    for row in _ROW.findall(answer):
        if not _OBJECT.fullmatch(row):
            blanks = " and blanks" if re.search(r"\s", row) else ""
            raise ValueError(
                "An object is neither a box nor a box and its mask. Expected: "
                "4 <loc…>, or 4 <loc…> and 16 <seg…>, without blanks between "
                "them, then the label, and ' ; ' before the next object. "
                f"Received: {row.count('<loc')} <loc…>, {row.count('<seg')} "
                f"<seg…>{blanks} in {row!r:.100}."
            )


def frames_of(images: Any) -> list[Any]:
    """Return the frames of an example; one picture is a list of one.

    Args:
        images: what the example holds: a picture, or a list or array of
            frames.

    Returns:
        list of pictures.

    Raises:
        ValueError: if there is no picture.

    Example:

    >>> frames_of("a.jpg")
    ['a.jpg']
    """
    # A list as pandas reads it, or an array of frames.
    several = getattr(images, "ndim", 0) in (1, 4)
    if not several and not isinstance(images, (list, tuple)):
        return [images]
    if not len(images):
        raise ValueError(
            f"There is no picture. Expected: one or more. Received: {images!r}."
        )
    return list(images)


def check(
    source: Any, preprocessor: Callable[..., Any] | None = None
) -> list[str]:
    """Read every example and report all errors at once.

    Pictures are decoded one at a time, and nothing is trained. Problems that
    are only warnings in training are reported too, such as `<image>` in front
    of a prompt.

    Args:
        source: any source.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`; with one,
            prompts and answers that are too long are reported as well.

    Returns:
        list of strings, one per invalid example, with its place. An example
        whose number of frames differs from the first valid one's is invalid.

    Example:

    ```python
    for problem in check(JSONLSource("train.jsonl")):
        print(problem)
    # train.jsonl, line 3: `suffix` is empty. …
    ```
    """
    problems, first = [], None
    for index in range(len(source)):
        place = where(source, index)
        try:
            with located(place), warnings.catch_warnings():
                # Only a warning in training, such as an answer that is cut.
                warnings.simplefilter("error")
                # The preprocessor adds the dropped tokens: nothing is lost.
                warnings.filterwarnings("ignore", re.escape(DROPPED))
                count = _check_example(source[index], preprocessor)
                first = first or (count, place)
                if count != first[0]:
                    raise ValueError(
                        f"The example has {count} frames, and {first[1]} has "
                        f"{first[0]}. {SAME_FRAMES}"
                    )
        except ExampleError as error:
            problems.append(str(error))
    return problems


def _check_example(example, preprocessor):
    """Read all of an example; return its number of frames."""
    answers = answers_of(example)
    plain_prompts(to_strings(example["prompts"], "prompts")[0])
    check_no_special_tokens(to_strings(answers, "responses")[0], "responses")
    images, count = example["images"], 0
    if images is not None:  # Else text alone.
        images = [read_image(image) for image in frames_of(images)]
        count = len(images)
        images = images[0] if count == 1 else images
    if preprocessor is None:
        return count
    for answer in answers:
        preprocessor(
            {
                "images": images,
                "prompts": example["prompts"],
                "responses": answer,
            }
        )
    return count
