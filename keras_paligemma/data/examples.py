"""One example: where it lies, what is wrong with it, how it is read."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any


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
        ValueError: there is none.

    Example:

    >>> answers_of({"responses": "a cat"})
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
