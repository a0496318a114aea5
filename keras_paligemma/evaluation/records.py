"""Records of data sets, whose fields get our names as they are read."""

import bisect
import itertools
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

_PATH = re.compile(r"([^.\[\]]+)(?:\[([^\[\]]+)\])?")


class Mapped(Sequence):
    """Records of a published data set, whose fields get our names.

    Args:
        dataset: of Hugging Face, TensorFlow Datasets, or a list: an object of
            a length and of `[index]`, which gives dictionaries.
        fields: dict of our names to paths; of pictures a list of paths where
            a prompt has several.
    """

    def __init__(self, dataset: Any, fields: Mapping):
        self.dataset = dataset
        self.fields = fields

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no record {index} of {len(self)}.")
        example = self.dataset[int(index)]
        return {
            name: [at_path(example, part) for part in path]
            if isinstance(path, list)
            else at_path(example, path)
            for name, path in self.fields.items()
        }


class Picked(Sequence):
    """Some records of several sequences, read when they are asked for.

    Args:
        parts: sequences of records.
        rows: numbers in all of them together; `None` takes all.
        shared: dicts of fields that all records of a part have, one a part.
    """

    def __init__(self, parts, rows=None, shared=None):
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))
        self.rows = range(self.ends[-1]) if rows is None else rows
        self.shared = shared or [{}] * len(parts)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        part = bisect.bisect_right(self.ends, row)
        first = self.ends[part] - len(self.parts[part])
        return self.shared[part] | self.parts[part][row - first]


def at_path(example: Mapping, path: str) -> Any:
    """Follow a path into an example.

    A name that has a slash or a full stop in itself, as TFDS's "image/id",
    goes before its parts. Of a list of structures, or a structure of lists,
    the parts are listed. "choices[answer]" takes the entry of a list that
    another field numbers.

    Args:
        example: dict.
        path: str.

    Returns:
        Python values in place of bytes and NumPy's scalars and lists; arrays
        of more dimensions, which are pictures, as they are.

    Raises:
        ValueError: there is no such field, with those that there are.

    Example:

    >>> at_path({"answers": [{"answer": b"cat"}]}, "answers.answer")
    ['cat']
    >>> at_path({"choices": ["a", "b"], "n": 1}, "choices[n]")
    'b'
    """
    if path in example:
        return _plain(example[path])
    head, _, rest = path.partition(".")
    found = _PATH.fullmatch(head)
    name, index = found.groups() if found else (head, None)
    if "/" in name and name not in example:
        outer, _, inner = name.partition("/")
        name, rest = outer, ".".join(filter(None, (inner, rest)))
    if name not in example:
        raise ValueError(
            f"There is no field {path!r}. Expected: one of {sorted(example)}."
        )
    value = example[name]
    if index is not None:
        value = _plain(value)[int(at_path(example, index))]
    if not rest:
        return _plain(value)
    if isinstance(value, Mapping):
        return at_path(value, rest)
    return [at_path(item, rest) for item in value]


def _plain(value) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value  # An encoded picture.
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        return value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray) and value.ndim <= 1:
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
