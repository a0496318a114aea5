"""Weights that are read from their checkpoint only when they are written.

A checkpoint is thus converted without a model and with one array in memory.
"""

from keras_paligemma.checkpoints import engine


class LazyTensor:
    """A weight that has not been read from its checkpoint yet.

    Args:
        row: `Row`.
        tensors: `engine.Last` of the checkpoint.
        shape: tuple, shape of the weight, with the layer axis first for
            weights of the blocks.
        on_read: function that is called with each array that was read, or
            `None`.
    """

    def __init__(self, row, tensors, shape, on_read=None):
        self.row, self.tensors = row, tensors
        self.shape, self.on_read = tuple(shape), on_read

    @property
    def num_layers(self):
        """Number of layers that share the name; 1 outside of the blocks."""
        return self.shape[0] if self.row.in_blocks else 1

    def read_layers(self):
        """Return an iterator of the array of each layer."""
        return map(self.read_layer, range(self.num_layers))

    def read_layer(self, number):
        """Return the array of one layer; number 0 outside of the blocks."""
        array = self.tensors.read_layer(self.row, self.shape, number)
        if self.on_read is not None:
            self.on_read(array)
        return array


def lazy_tensors(weights, rows, tensors, on_read=None):
    """Return weights of a checkpoint that are read when they are used.

    Args:
        weights: dict of name to any object with a `shape`, layer axis first.
        rows: list of `Row`.
        tensors: the checkpoint.
        on_read: see `LazyTensor`.

    Returns:
        dict of name to `LazyTensor`, for `engine.write`.
    """
    engine.check_names_and_shapes(weights, rows, tensors.shapes)
    tensors = engine.Last(tensors)
    return {
        row.name: LazyTensor(row, tensors, weights[row.name].shape, on_read)
        for row in rows
    }
