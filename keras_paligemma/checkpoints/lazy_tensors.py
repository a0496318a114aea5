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
        shape: tuple, of the weight, layer axis first in the blocks.
        on_read: function that is called with each array that was read, or
            `None`.
    """

    def __init__(self, row, tensors, shape, on_read=None):
        self.row, self.tensors = row, tensors
        self.shape, self.on_read = tuple(shape), on_read

    @property
    def num_layers(self):
        """Layers that share the name; one outside of the blocks."""
        return self.shape[0] if self.row.in_blocks else 1

    def read_layers(self):
        """Return an iterator of the array of each layer."""
        return map(self.read_layer, range(self.num_layers))

    def read_layer(self, number):
        """Return the array of one layer; outside of the blocks of number 0."""
        if self.row.stacked:
            array = self.tensors.read_layer(self.row.key, number)
        else:
            key = self.row.keys(self.num_layers)[number]
            array = self.tensors.read(key)
        shape = self.shape[1:] if self.row.in_blocks else self.shape
        array = self.row.read(array, shape)
        if self.on_read is not None:
            self.on_read(array)
        return array


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
        """Return one layer of a stacked array, without the others if it can."""
        if key != self._key and hasattr(self._tensors, "read_rows"):
            return self._tensors.read_rows(key, layer, layer + 1)[0]
        return self.read(key)[layer]


def lazy_tensors(weights, rows, tensors, on_read=None):
    """Return weights of a checkpoint that are read when they are asked for.

    Args:
        weights: dict of name to anything with a shape (layer axis first).
        rows: list of `Row`.
        tensors: the checkpoint.
        on_read: see `LazyTensor`.

    Returns:
        Dict of name to `LazyTensor`, which `engine.write` takes.
    """
    engine.check_names_and_shapes(weights, rows, tensors.shapes)
    tensors = Last(tensors)
    return {
        row.name: LazyTensor(row, tensors, weights[row.name].shape, on_read)
        for row in rows
    }
