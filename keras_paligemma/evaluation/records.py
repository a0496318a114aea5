"""Records of data sets, with fields renamed as they are read."""

import bisect
import itertools
import re
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

_PATH = re.compile(r"([^.\[\]]+)(?:\[([^\[\]]+)\])?")


class Mapped(Sequence):
    """Records of a published data set, with our field names.

    Args:
        dataset: data set of Hugging Face or TensorFlow Datasets, or a list: an
            object with a length whose `[index]` is a dict.
        fields: dict of our names to paths, see `at_path`; a list of paths for
            several pictures per prompt.
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
    """Selected records of several sequences, read on access.

    Args:
        parts: list of sequences of records.
        rows: sequence of int, indices into the concatenated parts; `None`
            takes all.
        shared: list of dicts, one per part, of fields to add to its records.
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

    "a.b" and "a/b" are field b of field a, unless a field has that whole name,
    such as TFDS's "image/id". In a list of structures, the path is followed in
    each of them. "choices[answer]" is the entry of the list `choices` whose
    index is the field `answer`.

    Args:
        example: dict, one record.
        path: str.

    Returns:
        The value, with bytes decoded as UTF-8 where possible, and NumPy
        scalars and 1-D arrays as Python values. Arrays of more dimensions,
        which are pictures, are returned unchanged.

    Raises:
        ValueError: there is no such field; the message lists those there are.

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
    if name not in example:
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
            return value  # Not text: an encoded picture.
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        return value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray) and value.ndim <= 1:
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
