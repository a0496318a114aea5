"""One example: where it lies, what is wrong with it, how it is read."""

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

# What looks like a token of a place or of a mask and is none.
_NO_TOKEN = re.compile(
    r"<loc(?!(?:0\d{3}|10[01]\d|102[0-3])>)-?\d+>"
    r"|<seg(?!(?:0\d{2}|1[01]\d|12[0-7])>)-?\d+>"
)
# A box, and not a part of a longer row of places.
_BOX = re.compile(r"(?<!<loc\d{4}>)" + r"<loc(\d{4})>" * 4 + r"(?!<loc)")


class ExampleError(ValueError):
    """An example that cannot be used; the message begins with its place."""


@contextlib.contextmanager
def located(place: str):
    """Put the place of an example before the message of what it raises.

    Args:
        place: str, such as `"train.jsonl, line 3"`.

    Raises:
        ExampleError: for whatever was raised inside. An `ExampleError` tells
            its place already and passes; so does a `MemoryError`, which is
            not the example's fault.

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
    """Name the place of an example in words.

    Args:
        source: a source; `source.where(index)` is used if it has one.
        index: int.

    Returns:
        str, for lists and the like `"example 3"`, counted from 0.
    """
    name = getattr(source, "where", None)
    return f"example {index}" if name is None else name(index)


def answers_of(example: dict) -> list[str]:
    """List the answers of an example, one or several.

    Args:
        example: dict with `responses`.

    Returns:
        List of at least one string.

    Raises:
        ValueError: there is none; one names a place outside of pictures,
            which would be trained on as letters; or has a box upside down.

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
    for answer in answers:
        wrong = isinstance(answer, str) and _NO_TOKEN.search(answer)
        if wrong:
            raise ValueError(
                "A place or mask is outside of its range. Expected: <loc0000> "
                "to <loc1023>, of which a box has four (y1, x1, y2, x2), and "
                f"<seg000> to <seg127>. Received: {wrong[0]!r:.40}."
            )
        for box in _BOX.finditer(answer if isinstance(answer, str) else ""):
            y1, x1, y2, x2 = map(int, box.groups())
            if y1 > y2 or x1 > x2:
                raise ValueError(
                    "A box is upside down. Expected: (y1, x1, y2, x2), the "
                    f"upper left corner first. Received: {box[0]!r}."
                )
    return answers


def check(source: Any, preprocessor: Callable | None = None) -> list[str]:
    """Read every example and say at once all that is wrong.

    Nothing is trained on meanwhile; pictures are decoded, one at a time.

    Args:
        source: any source.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`; with one,
            prompts and answers that are too long are told as well.

    Returns:
        List of strings, one a bad example, each with its place.

    Example:

    ```python
    for problem in check(JSONLSource("train.jsonl")):
        print(problem)
    # train.jsonl, line 3: `suffix` is empty. …
    ```
    """
    # Here, since it brings Keras.
    from keras_paligemma.preprocessing.images import read_image

    problems = []
    for index in range(len(source)):
        try:
            with located(where(source, index)), warnings.catch_warnings():
                # What only warns in training, such as an answer that is cut.
                warnings.simplefilter("error")
                example = source[index]
                answers = answers_of(example)
                images = example["images"]
                if isinstance(images, (list, tuple)):
                    images = [read_image(image) for image in images]
                else:
                    images = read_image(images)
                if preprocessor is None:
                    continue
                for answer in answers:
                    preprocessor(
                        {
                            "images": images,
                            "prompts": example["prompts"],
                            "responses": answer,
                        }
                    )
        except ExampleError as error:
            problems.append(str(error))
    return problems
