"""Dropout with a seed from outside of the layer.

A scanned block cannot hold random state: changes of it inside of the loop are
lost, and every layer would use the same dropout mask. So the stack draws one
seed per call, and each dropout inside of a block derives its own seed from it.
"""

import contextlib
import contextvars
import zlib

import keras
from keras import ops

_SEED = contextvars.ContextVar("dropout_seed", default=None)


@contextlib.contextmanager
def dropout_scope(seed, number):
    """Enable `drop` inside of a block.

    Args:
        seed: int tensor (2,), drawn from a `keras.random.SeedGenerator`;
            `None` disables dropout.
        number: int or scalar tensor, index of the block.
    """
    if seed is not None:
        number = ops.cast(number, seed.dtype)
        # A large prime: some backends add both halves of a seed. The sum must
        # not equal that of another layer a few steps later.
        seed = seed + ops.stack([number * 15_485_863, ops.zeros_like(number)])
    token = _SEED.set(seed)
    try:
        yield
    finally:
        _SEED.reset(token)


def drop(x, rate, place):
    """Apply dropout inside of a `dropout_scope`; return `x` elsewhere.

    Args:
        x: tensor.
        rate: float, fraction that is set to zero.
        place: str, path of the caller; different places of a block drop
            independently.

    Returns:
        Tensor like `x`.
    """
    seed = _SEED.get()
    if seed is None or not rate:
        return x
    part = place.rsplit("block/", 1)[-1]
    salt = zlib.crc32(part.encode()) % 2**20 * 1009
    seed = seed + ops.convert_to_tensor([salt, 0], dtype=seed.dtype)
    return keras.random.dropout(x, rate, seed=_Given(seed))


class _Given(keras.random.SeedGenerator):
    """A seed generator that returns a given seed."""

    def __init__(self, value):
        self.value = value
        # With `None` Keras on Torch would use its default generator.
        self._initial_seed = 0

    def next(self, ordered=True):
        return self.value
