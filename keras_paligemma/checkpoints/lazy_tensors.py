"""Weights that stay in their checkpoint until a writer asks for them.

So a checkpoint is converted with one array in memory, and without a model.
"""

from typing import Any

from keras_paligemma.checkpoints import engine


class LazyTensor:
    """A weight that still lies in its checkpoint.

    Args:
        row: `Row`.
        tensors: the checkpoint.
        shape: tuple, of the weight, or of one block of it.
        layer: int or `None`, which block.
    """

    def __init__(self, row, tensors, shape, layer=None):
        self.row, self.tensors = row, tensors
        self.shape, self.layer = shape, layer

    def read(self):
        """Give its array."""
        if self.layer is None:
            array = self.tensors.read(self.row.theirs)
        elif self.row.stacked:
            array = self.tensors.read_layer(self.row.theirs, self.layer)
        else:
            key = self.row.keys(self.layer + 1)[self.layer]
            array = self.tensors.read(key)
        return self.row.read(array, self.shape)


class Last:
    """Tensors that keep the array read last: stacked ones are asked often.

    Args:
        tensors: the checkpoint.
    """

    def __init__(self, tensors):
        self.shapes, self.dtypes = tensors.shapes, tensors.dtypes
        self._tensors = tensors
        self._key: str | None = None
        self._array: Any = None

    def read(self, key):
        if key != self._key:
            self._array = None
            self._key, self._array = key, self._tensors.read(key)
        return self._array

    def read_layer(self, key, layer):
        """Give one layer of a stacked array, without the others if it can."""
        if key != self._key and hasattr(self._tensors, "read_rows"):
            return self._tensors.read_rows(key, layer, layer + 1)[0]
        return self.read(key)[layer]


def hold(weights, rows, tensors):
    """Give weights of a checkpoint that are read when they are asked for.

    Args:
        weights: dict of name to anything with a shape (layer axis first).
        rows: list of `Row`.
        tensors: the checkpoint.

    Returns:
        Dict of name to `LazyTensor`, or of blocks to a list of them, as
        `engine.write` takes it with `LazyTensor.read`.
    """
    engine.check(weights, rows, tensors.shapes)
    tensors = Last(tensors)
    held = {}
    for row in rows:
        shape = engine.shape_of(weights[row.ours])
        held[row.ours] = (
            [
                LazyTensor(row, tensors, shape[1:], one)
                for one in range(shape[0])
            ]
            if row.in_blocks
            else LazyTensor(row, tensors, shape)
        )
    return held
