"""Move weights between a checkpoint's names and ours: one engine for all.

A format is a table of rows; the engine compares, reports and moves, in both
directions. It knows variables by name, arrays and strings, and no model class.

The tensors of a checkpoint are any object with `shapes` and `dtypes`, dicts by
key, and `read(key)`, which gives one NumPy array.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

from keras_paligemma.compat import fill
from keras_paligemma.compat import to_host

LAYER = "{layer}"
BLOCKS = "/blocks/"
SHOWN = 100  # Problems that an error lists.


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of ours and the array, or arrays, of theirs that hold it.

    Axes are those of one block: a weight of the blocks (its name has
    "/blocks/") is one array a block where `theirs` has a "{layer}", else one
    array for all, layer axis first.

    Args:
        ours: str, name as `backbone.weights_by_name` gives it.
        theirs: str, key in the checkpoint.
        axes: str or `None`: their axes, then ours, such as "(n h) d -> d n h":
            what is in brackets is one axis there, "1" an axis of size one.
        part: int or `None`: which index of their leading axis is ours, where
            they store several weights as one array.
        parts: int, how many there are.
        extra: int, rows that they have beyond ours. Written as the mean of
            ours: the logit of such a row is the mean of all logits, so that
            no greedy decoding ever chooses it.
        bare_first: bool, block 0 has no number, as Keras names the items of
            a list: "block", "block_1", …

    Example:
        >>> row = Row("query/kernel", "q_proj.weight", "(n h) d -> d n h")
        >>> row.their_shape((8, 2, 3))
        (6, 8)
    """

    ours: str
    theirs: str
    axes: str | None = None
    part: int | None = None
    parts: int = 0
    extra: int = 0
    bare_first: bool = False

    @property
    def in_blocks(self):
        return BLOCKS in self.ours

    @property
    def stacked(self):
        """Whether one array of theirs holds all blocks."""
        return self.in_blocks and LAYER not in self.theirs

    def keys(self, num_layers):
        """List their keys, one a block or one alone."""
        if LAYER not in self.theirs:
            return [self.theirs]
        keys = [
            self.theirs.replace(LAYER, str(layer))
            for layer in range(num_layers)
        ]
        if self.bare_first:
            keys[0] = self.theirs.replace(f"_{LAYER}", "")
        return keys

    def read(self, array, shape):
        """Turn their array into ours of `shape`: a view, nothing is copied."""
        if self.part is not None:
            array = array[self.part]
        if self.extra:
            array = array[: shape[0]]
        if self.axes is None:
            return array
        groups, ours = _parse(self.axes)
        flat = [name for group in groups for name in group if name != "1"]
        sizes = dict(zip(ours, shape, strict=True))
        array = array.reshape([sizes[name] for name in flat])
        return array.transpose([flat.index(name) for name in ours])

    def write(self, value):
        """Turn our array into theirs, or into their part: a view if it can."""
        if self.axes is not None:
            shape = self._split_shape(value.shape)
            groups, ours = _parse(self.axes)
            flat = [name for group in groups for name in group if name != "1"]
            value = value.transpose([ours.index(name) for name in flat])
            value = value.reshape(shape)
        if self.extra:
            mean = value.mean(axis=0, keepdims=True, dtype="float64")
            mean = mean.astype(value.dtype).repeat(self.extra, axis=0)
            value = np.concatenate([value, mean])
        return value

    def their_shape(self, shape):
        """Give the shape of their array for a weight of ours."""
        shape = self._split_shape(tuple(shape))
        if self.extra:
            shape = (shape[0] + self.extra, *shape[1:])
        return shape if self.part is None else (self.parts, *shape)

    def _split_shape(self, shape):
        if self.axes is None:
            return shape
        groups, ours = _parse(self.axes)
        sizes = dict(zip(ours, shape, strict=True)) | {"1": 1}
        return tuple(
            math.prod(sizes[name] for name in group) for group in groups
        )


def _parse(axes):
    """Split "(n h) d -> d n h" into [[n, h], [d]] and [d, n, h]."""
    theirs, ours = axes.split("->")
    groups = re.findall(r"\(([^)]*)\)|(\S+)", theirs)
    return [(many or one).split() for many, one in groups], ours.split()


class Arrays:
    """The tensors of a checkpoint that is a dict of arrays.

    Args:
        arrays: dict of key to array.
    """

    def __init__(self, arrays):
        self.shapes = {key: array.shape for key, array in arrays.items()}
        self.dtypes = {key: str(array.dtype) for key, array in arrays.items()}
        self.read = arrays.__getitem__


def shape_of(weight):
    """Give the shape of a weight; of a list of layers, layer axis first."""
    if isinstance(weight, list):
        return (len(weight), *weight[0].shape)
    return tuple(weight.shape)


def shapes(weights, rows):
    """Give the keys and shapes of the checkpoint that holds these weights.

    Args:
        weights: dict of name to variable, list of variables, or anything with
            a `shape` (layer axis first).
        rows: list of `Row`.

    Returns:
        Dict of their key to shape, in the order of the rows.
    """
    result = {}
    for row in rows:
        shape = shape_of(weights[row.ours])
        if not row.in_blocks:
            result[row.theirs] = row.their_shape(shape)
            continue
        one = row.their_shape(shape[1:])
        for key in row.keys(shape[0]):
            result[key] = (shape[0], *one) if row.stacked else one
    return result


def problems(weights, rows, found):
    """List every missing, misshaped and unused key of a checkpoint.

    Args:
        weights: see `shapes`.
        rows: list of `Row`.
        found: dict of their key to shape.

    Returns:
        List of str, empty if the checkpoint fits.
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
    held = {row.ours for row in rows}
    listed += [f"no row: {name}" for name in weights if name not in held]
    return listed + [f"unused: {key}" for key in found if key not in expected]


def check(weights, rows, found):
    """Compare a checkpoint's names and shapes with the model's, all at once.

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
    """Fill the model's weights from a checkpoint, one array at a time.

    Each is cast to its variable's dtype and placed as it is read.

    Args:
        weights: dict of name to variable or list of variables.
        rows: list of `Row`.
        tensors: the checkpoint; all shapes are compared before any read.
    """
    check(weights, rows, tensors.shapes)
    key, array = None, None
    # Rows that share an array follow one another, so that it is read once.
    for row in sorted(rows, key=lambda row: row.theirs):
        weight = weights[row.ours]
        if row.in_blocks and not row.stacked:
            keys = row.keys(shape_of(weight)[0])
            _fill(weight, row, (tensors.read(key) for key in keys))
            continue
        if row.stacked and isinstance(weight, list):
            if hasattr(tensors, "read_rows"):
                _fill(weight, row, _layers(tensors, row.theirs))
                continue
        if row.theirs != key:
            array = None  # Let go of the last one before the next is read.
            key, array = row.theirs, tensors.read(row.theirs)
        if row.stacked:
            _fill(weight, row, array)
        else:
            fill(weight, row.read(array, tuple(weight.shape)))


def _layers(tensors, key):
    """Read an array of all blocks one block at a time."""
    for layer in range(tensors.shapes[key][0]):
        yield tensors.read_rows(key, layer, layer + 1)[0]


def _fill(weight, row, blocks):
    """Fill a weight of the blocks from an iterable of one array a block."""
    if isinstance(weight, list):
        for variable, array in zip(weight, blocks, strict=True):
            fill(variable, row.read(array, tuple(variable.shape)))
        return
    shape = tuple(weight.shape)
    if isinstance(blocks, np.ndarray) and row.axes is None and not row.parts:
        fill(weight, blocks)
        return
    # Blocks stacked on the host, in the variable's dtype, and let go of once
    # they are placed: as large as the largest tensor at most, so the peak stays
    # below the weights and the largest tensor, which here is a stacked one.
    whole = np.empty(shape, np.dtype(weight.dtype))
    for layer, array in enumerate(blocks):
        whole[layer] = row.read(array, shape[1:])
    fill(weight, whole)


def write(weights, rows, to_numpy):
    """Give the arrays of a checkpoint, one at a time.

    Args:
        weights: dict of name to variable or list of variables.
        rows: list of `Row`.
        to_numpy: function of a variable that returns its NumPy array.

    Yields:
        Pairs of their key and array, in the order of `shapes`.
    """
    groups = {}
    for row in rows:
        groups.setdefault(row.theirs, []).append(row)
    for theirs, group in groups.items():
        group = sorted(group, key=lambda row: row.part or 0)
        if not group[0].in_blocks:
            (row,) = group
            yield theirs, row.write(to_numpy(weights[row.ours]))
            continue
        count = shape_of(weights[group[0].ours])[0]
        values = [_blocks(weights[row.ours], to_numpy) for row in group]
        blocks = (_join(group, ones) for ones in zip(*values, strict=True))
        if group[0].stacked:
            yield theirs, _stack(blocks, count)
        else:
            yield from zip(group[0].keys(count), blocks, strict=True)


def _blocks(weight, to_numpy):
    """Give a weight of the blocks as an iterable of one array a block."""
    if isinstance(weight, list):
        return map(to_numpy, weight)
    return to_numpy(weight)


def _stack(blocks, count):
    """Stack arrays, of which one at a time is in memory."""
    first = next(blocks)
    whole = np.empty((count, *first.shape), first.dtype)
    for layer, block in enumerate(itertools.chain([first], blocks)):
        whole[layer] = block
    return whole


def _join(group, values):
    """Make their array of one block from the parts that rows hold."""
    parts = [row.write(one) for row, one in zip(group, values, strict=True)]
    return parts[0] if group[0].part is None else np.stack(parts)


def to_numpy(variable):
    """Give a variable's array, bfloat16 included."""
    return to_host(variable)


def to_array(weight):
    """Give a weight's array, layer axis first if it is a list of layers."""
    if isinstance(weight, list):
        return np.stack([to_numpy(one) for one in weight])
    return to_numpy(weight)


def count(weights):
    """Count the parameters of a dict of weights."""
    return sum(math.prod(shape_of(weight)) for weight in weights.values())
