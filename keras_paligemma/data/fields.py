"""Data sets of other libraries, read by field names."""

import string
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from keras_paligemma.data.examples import located


class FieldSource:
    """Examples of any data set with a length and `[index]`.

    For example those of Hugging Face (`datasets.load_dataset(…,
    split="train")`, memory-mapped, so it may exceed memory), TensorFlow
    Datasets (`tfds.data_source(…, split="train")`, without TensorFlow), Grain
    or Torch, or a list of dictionaries.

    Args:
        dataset: the data set; its examples are dictionaries.
        images: str, the field of the picture, or of a list of frames.
        prompts: str, the prompt itself, where `{field}` is replaced by the
            field's text: "caption en", "answer en {question}".
        responses: str, the field of the answer, or of a list of answers of
            which `Batches` draws one each epoch.

            Each of the three may also be a function from the example to the
            picture, the prompt, and the answer or answers.
        allow_empty: bool, whether an answer may be empty, as for pictures
            where there is nothing to detect.

    Raises:
        ValueError: if the data set has no random access. A stream could
            neither be shuffled globally nor resumed at a position.
        ExampleError: on `source[index]`, if a field is missing, or not text.

    Example:

    ```python
    vqa = datasets.load_dataset("…", split="train")
    source = FieldSource(
        vqa, prompts="answer en {question}", responses="answers"
    )
    digits = tfds.data_source("mnist", split="train")
    source = FieldSource(
        digits, prompts="ocr", responses=lambda example: str(example["label"])
    )
    ```
    """

    def __init__(
        self,
        dataset: Any,
        images: str | Callable[..., Any] = "image",
        prompts: str | Callable[..., Any] = "caption en",
        responses: str | Callable[..., Any] = "caption",
        allow_empty: bool = False,
    ) -> None:
        check_numbered(dataset)
        self.dataset = dataset
        self.images = images
        self.prompts = prompts
        self.responses = responses
        self.allow_empty = allow_empty

    def __len__(self):
        return len(self.dataset)

    def where(self, index: int) -> str:
        """Return the place of an example, its index from 0."""
        return f"{type(self.dataset).__name__}[{index}]"

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no example {index} of {len(self)}.")
        with located(self.where(index)):
            example = self.dataset[int(index)]
            responses = _get(example, self.responses)
            if hasattr(responses, "tolist"):  # Arrays, of TFDS.
                responses = responses.tolist()
            if isinstance(responses, (list, tuple)):
                responses = [
                    _text(response, "an answer", self.allow_empty)
                    for response in responses
                ]
            else:
                responses = _text(responses, "the answer", self.allow_empty)
            if callable(self.prompts):
                prompt = _text(self.prompts(example), "the prompt")
            else:
                prompt = fill(
                    self.prompts,
                    lambda field: _text(
                        _get(example, field), f"field {field!r}"
                    ),
                )
            return {
                "images": _get(example, self.images),
                "prompts": prompt,
                "responses": responses,
            }


def check_numbered(dataset: Any):
    """Raise on a data set without random access to examples.

    Args:
        dataset: object that should have a length and `[index]`.

    Raises:
        ValueError: if it is a dictionary, a stream, or a table of columns.
    """
    for attribute, method in (
        ("iloc", "to_dict('records')"),  # pandas
        ("to_pylist", "to_pylist()"),  # pyarrow
    ):
        if hasattr(dataset, attribute):
            raise ValueError(
                "A table gives columns by name, no examples by number. "
                f"Expected: a list of dictionaries, which its `.{method}` "
                f"makes. Received: {type(dataset).__name__}."
            )
    if isinstance(dataset, Mapping):
        raise ValueError(
            "This is a dictionary of data sets. Expected: one of them, "
            f"such as dataset['train']. Received: {sorted(dataset)}."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "The data set cannot be asked for an example by number. "
            "Expected: `len(dataset)` and `dataset[index]`, as of "
            "datasets.Dataset or tfds.data_source. Received: "
            f"{type(dataset).__name__}. Load it without `streaming=True` "
            "(it is read from disk all the same), take "
            "`tfds.data_source` in place of `tfds.load`, or write it to "
            "JSONL."
        )


def _get(example, field):
    if callable(field):
        return field(example)
    if field not in example:
        raise ValueError(
            f"There is no field {field!r}. Expected: one of "
            f"{sorted(example)}. Name the fields with `images=`, `prompts=` "
            "and `responses=`, or pass functions of the example."
        )
    return example[field]


def fill(template: str, text_of: Callable[[str], str]) -> str:
    """Replace each `{field}` of a template by the field's text.

    Example:

    >>> fill("caption {language}", {"language": "en"}.__getitem__)
    'caption en'
    """
    return "".join(
        literal if field is None else literal + text_of(field)
        for literal, field, _, _ in string.Formatter().parse(template)
    )


def _text(value, name, allow_empty=False):
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    name = f"{name[0].upper()}{name[1:]}"
    if not isinstance(value, str):
        raise ValueError(
            f"{name} is not text. Expected: a string or UTF-8 bytes. Received: "
            f"{value!r:.80} of type {type(value).__name__}. Turn it into text "
            "with a function, such as "
            "`responses=lambda example: str(example['label'])`."
        )
    if not allow_empty and not value.strip():
        raise ValueError(
            f"{name} is empty. Expected: text. Received: {value!r:.80}. Where "
            "an empty answer is meant, pass `allow_empty=True`."
        )
    return value
