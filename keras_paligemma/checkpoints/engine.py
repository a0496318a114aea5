"""Move weights between a checkpoint's names and ours: one engine for all.

A format is a table of rows; the engine compares, reports and moves. It knows
variables by name, arrays and strings, and no model class.
"""

import dataclasses
import math

import numpy as np

from keras_paligemma.compat import fill


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of ours and the array of theirs that holds it.

    Args:
        ours: str, name as `backbone.weights_by_name` gives it.
        theirs: str, key in the checkpoint.
        axes: tuple of ints or `None`: order of their axes in ours.
        part: int or `None`: which index of their axis 1 (after the layers) is
            ours, where they store several weights as one array.
        parts: int, how many there are.
        squeeze: bool, their leading axis of size 1 is not in ours.
    """

    ours: str
    theirs: str
    axes: tuple | None = None
    part: int | None = None
    parts: int = 0
    squeeze: bool = False

    def read(self, array):
        """Turn their array into ours: a view, nothing is copied."""
        if self.squeeze:
            array = array[0]
        if self.part is not None:
            array = array[:, self.part]
        return array if self.axes is None else array.transpose(self.axes)

    def their_shape(self, shape):
        """Give the shape of their array for a weight of ours."""
        if self.axes is not None:
            order = np.argsort(self.axes)
            shape = tuple(shape[i] for i in order)
        if self.part is not None:
            shape = (shape[0], self.parts, *shape[1:])
        return (1, *shape) if self.squeeze else tuple(shape)


def shape_of(weight):
    """Give the shape of a weight; of a list of layers, layer axis first."""
    if isinstance(weight, list):
        return (len(weight), *weight[0].shape)
    return tuple(weight.shape)


def check(weights, rows, shapes):
    """Compare a checkpoint's names and shapes with the model's, all at once.

    Args:
        weights: dict of name to variable or list of variables.
        rows: list of `Row`.
        shapes: dict of their key to shape.

    Raises:
        ValueError: listing every missing, unused and misshaped key.
    """
    problems = []
    for row in rows:
        if row.theirs not in shapes:
            problems.append(f"missing: {row.theirs} (for {row.ours})")
            continue
        expected = row.their_shape(shape_of(weights[row.ours]))
        received = tuple(shapes[row.theirs])
        if received != expected:
            problems.append(
                f"shape: {row.theirs} is {received}, expected {expected}"
            )
    known = {row.theirs for row in rows}
    problems += [f"unused: {key}" for key in shapes if key not in known]
    if problems:
        shown = "\n  ".join(problems)
        raise ValueError(
            f"The checkpoint does not fit the model in {len(problems)} places; "
            f"nothing was loaded.\n  {shown}\nIs it a checkpoint of this "
            "variant, and whole?"
        )


def load(weights, rows, shapes, read):
    """Fill the model's weights from a checkpoint, one array at a time.

    Args:
        weights: dict of name to variable or list of variables.
        rows: list of `Row`.
        shapes: dict of their key to shape; all are compared before any read.
        read: function of their key that returns the array.
    """
    check(weights, rows, shapes)
    key, array = None, None
    for row in sorted(rows, key=lambda row: row.theirs):
        if row.theirs != key:
            key, array = row.theirs, read(row.theirs)
        value = row.read(array)
        weight = weights[row.ours]
        if isinstance(weight, list):
            for layer, variable in enumerate(weight):
                fill(variable, np.ascontiguousarray(value[layer]))
        else:
            fill(weight, np.ascontiguousarray(value))


def count(weights):
    """Count the parameters of a dict of weights."""
    return sum(math.prod(shape_of(weight)) for weight in weights.values())
