"""Move weights between a checkpoint and a model, for every format.

A format is a table of rows. The engine compares names and shapes, reports all
differences, and moves arrays in either direction. It handles names and arrays,
not model classes.

The tensors of a checkpoint are any object with `shapes` and `dtypes`, dicts by
key, and `read(key)`, which returns one NumPy array.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

LAYER = "{layer}"
BLOCKS = "/blocks/"
SHOWN = 100  # Maximum number of problems that an error lists.


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: a weight, and its array or arrays in a checkpoint.

    Axes are those of one block. A weight of the blocks (its name contains
    "/blocks/") has one array per block if `key` contains "{layer}", otherwise
    one array for all blocks, with the layer axis first.

    Args:
        name: str, name in `backbone.weights_by_name`.
        key: str, key in the checkpoint.
        axes: str or `None`: the axes in the checkpoint, then the weight's,
            such as "(n h) d -> d n h". Brackets join several axes into one of
            the checkpoint; "1" is an axis of size one.
        part: int or `None`: the weight's index in the leading axis of an
            array that holds several weights.
        parts: int, number of weights in that array.
        extra: int, rows of the array beyond the weight's. They are written as
            the mean of its rows, so that their logit is the mean of all
            logits and greedy decoding never chooses them.
        bare_first: bool, whether block 0 has no number, as in Keras's names
            of list items: "block", "block_1", …

    Example:
        >>> row = Row("query/kernel", "q_proj.weight", "(n h) d -> d n h")
        >>> row.checkpoint_shape((8, 2, 3))
        (6, 8)
    """

    name: str
    key: str
    axes: str | None = None
    part: int | None = None
    parts: int = 0
    extra: int = 0
    bare_first: bool = False

    @property
    def in_blocks(self):
        return BLOCKS in self.name

    @property
    def stacked(self):
        """Whether one array holds all blocks."""
        return self.in_blocks and LAYER not in self.key

    @property
    def is_identity(self):
        """Whether the array equals the weight, without any change of axes."""
        return self.axes is None and self.part is None and not self.extra

    def keys(self, num_layers):
        """List the keys: one per block, or a single one."""
        if LAYER not in self.key:
            return [self.key]
        keys = [
            self.key.replace(LAYER, str(layer)) for layer in range(num_layers)
        ]
        if self.bare_first:
            keys[0] = self.key.replace(f"_{LAYER}", "")
        return keys

    def read(self, array, shape):
        """Convert an array to the weight's `shape`, as a view."""
        if self.part is not None:
            array = array[self.part]
        if self.extra:
            array = array[: shape[0]]
        if self.axes is None:
            return array
        groups, axes = _parse(self.axes)
        flat = _flat(groups)
        sizes = dict(zip(axes, shape, strict=True))
        array = array.reshape([sizes[name] for name in flat])
        return array.transpose([flat.index(name) for name in axes])

    def write(self, value):
        """Convert a weight's array to the checkpoint's, a view if possible."""
        if self.axes is not None:
            shape = self._split_shape(value.shape)
            groups, axes = _parse(self.axes)
            value = value.transpose(
                [axes.index(name) for name in _flat(groups)]
            )
            value = value.reshape(shape)
        if self.extra:
            mean = value.mean(axis=0, keepdims=True, dtype="float64")
            mean = mean.astype(value.dtype).repeat(self.extra, axis=0)
            value = np.concatenate([value, mean])
        return value

    def checkpoint_shape(self, shape):
        """Return the shape of the array that holds a weight of this shape."""
        shape = self._split_shape(tuple(shape))
        if self.extra:
            shape = (shape[0] + self.extra, *shape[1:])
        return shape if self.part is None else (self.parts, *shape)

    def _split_shape(self, shape):
        if self.axes is None:
            return shape
        groups, axes = _parse(self.axes)
        sizes = dict(zip(axes, shape, strict=True)) | {"1": 1}
        return tuple(
            math.prod(sizes[name] for name in group) for group in groups
        )


def _parse(axes):
    """Split "(n h) d -> d n h" into [[n, h], [d]] and [d, n, h]."""
    array_axes, weight_axes = axes.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", array_axes)
    groups = [(many or axis).split() for many, axis in groups]
    return groups, weight_axes.split()


def _flat(groups):
    """List the axes of groups, without those of size one."""
    return [name for group in groups for name in group if name != "1"]


class Arrays:
    """The tensors of a checkpoint in memory, given as a dict of arrays.

    Args:
        arrays: dict of key to array.
    """

    def __init__(self, arrays):
        self.shapes = {key: array.shape for key, array in arrays.items()}
        self.dtypes = {key: str(array.dtype) for key, array in arrays.items()}
        self.read = arrays.__getitem__


def shapes(weights, rows):
    """Return the keys and shapes that these weights have in a checkpoint.

    Args:
        weights: dict of name to `layers.weight.Weight`, or to any object with
            its `shape`.
        rows: list of `Row`.

    Returns:
        dict of key to shape, in the order of the rows.
    """
    result = {}
    for row in rows:
        shape = tuple(weights[row.name].shape)
        if not row.in_blocks:
            result[row.key] = row.checkpoint_shape(shape)
            continue
        array_shape = row.checkpoint_shape(shape[1:])
        for key in row.keys(shape[0]):
            result[key] = (
                (shape[0], *array_shape) if row.stacked else array_shape
            )
    return result


def problems(weights, rows, found):
    """List every missing, misshaped and unused key of a checkpoint.

    Args:
        weights: see `shapes`.
        rows: list of `Row`.
        found: dict of key to shape.

    Returns:
        list of str; empty if all keys and shapes match.
    """
    expected = shapes(weights, rows)
    listed = []
    for key, shape in expected.items():
        if key not in found:
            listed.append(f"missing: {key} {shape}")
        elif tuple(found[key]) != shape:
            listed.append(
                f"shape: {key} is {tuple(found[key])}, expected {shape}"
            )
    names = {row.name for row in rows}
    listed += [f"no row: {name}" for name in weights if name not in names]
    return listed + [f"unused: {key}" for key in found if key not in expected]


def check_names_and_shapes(weights, rows, found):
    """Raise if a checkpoint's names or shapes differ from the model's.

    Raises:
        ValueError: listing missing, unused and misshaped keys, up to `SHOWN`.
    """
    listed = problems(weights, rows, found)
    if listed:
        shown = "\n  ".join(listed[:SHOWN])
        if len(listed) > SHOWN:
            shown += f"\n  … and {len(listed) - SHOWN} more"
        raise ValueError(
            f"The checkpoint does not fit the model in {len(listed)} places; "
            f"nothing was loaded.\n  {shown}\nIs it a checkpoint of this "
            "variant, and whole?"
        )


def load(weights, rows, tensors):
    """Assign a checkpoint's arrays to the model's weights, one at a time.

    Each array is cast to its variable's dtype and moved to its device before
    the next is read.

    Args:
        weights: dict of name to `Weight`.
        rows: list of `Row`.
        tensors: the checkpoint; all shapes are compared before any is read.
    """
    check_names_and_shapes(weights, rows, tensors.shapes)
    tensors = Last(tensors)
    # Rows that share an array are adjacent, so it is read only once.
    for row in sorted(rows, key=lambda row: row.key):
        weight = weights[row.name]
        is_equal = row.stacked and row.is_identity and weight.is_one_array
        if row.in_blocks and not is_equal:
            weight.assign_layers(
                tensors.read_layer(row, weight.shape, number)
                for number in range(weight.num_layers)
            )
        else:
            weight.assign(row.read(tensors.read(row.key), weight.shape))


class Last:
    """Tensors that keep the last array: layers are read one after another.

    Args:
        tensors: the checkpoint.
    """

    def __init__(self, tensors):
        self._tensors = tensors
        self._key: str | None = None
        self._array: Any = None

    def read(self, key):
        if key != self._key:
            # Free the previous array before the next is read.
            self._array = None
            self._key, self._array = key, self._tensors.read(key)
        return self._array

    def read_layer(self, row, shape, number):
        """Return one layer of a weight.

        Args:
            row: `Row`.
            shape: tuple, shape of the weight, layer axis first in the blocks.
            number: int, index of the layer; 0 outside of the blocks.
        """
        if not row.in_blocks:
            return row.read(self.read(row.key), shape)
        if not row.stacked:
            array = self.read(row.keys(shape[0])[number])
        elif row.key != self._key and hasattr(self._tensors, "read_rows"):
            array = self._tensors.read_rows(row.key, number, number + 1)[0]
        else:
            array = self.read(row.key)[number]
        return row.read(array, shape[1:])


def write(weights, rows):
    """Return the arrays of a checkpoint, one at a time.

    Args:
        weights: dict of name to `Weight` or `LazyTensor`.
        rows: list of `Row`.

    Yields:
        Pairs of key and array, in the order of `shapes`.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    for key, group in groups.items():
        group = sorted(group, key=lambda row: row.part or 0)
        layers = [weights[row.name].read_layers() for row in group]
        arrays = (_join(group, values) for values in zip(*layers, strict=True))
        num_layers = weights[group[0].name].num_layers
        if group[0].stacked:
            yield key, _stack(arrays, num_layers)
        else:
            yield from zip(group[0].keys(num_layers), arrays, strict=True)


def _stack(arrays, count):
    """Stack an iterable of arrays, with one of them in memory at a time."""
    first = next(arrays)
    stack = np.empty((count, *first.shape), first.dtype)
    for layer, array in enumerate(itertools.chain([first], arrays)):
        stack[layer] = array
    return stack


def _join(group, values):
    """Return the checkpoint's array of one block from its rows' values."""
    parts = [row.write(value) for row, value in zip(group, values, strict=True)]
    return parts[0] if group[0].part is None else np.stack(parts)


def count(weights):
    """Count the parameters of a dict of weights."""
    return sum(math.prod(weight.shape) for weight in weights.values())
