"""Dropout whose seed comes from outside of the layer that drops.

A block that is scanned cannot hold a random state: a state that changes inside
of the loop is lost, and every layer would drop the same. So the stack draws
one seed a call, and what drops inside of a block mixes its place into it.
"""

import contextlib
import contextvars
import zlib

import keras
from keras import ops

_SEED = contextvars.ContextVar("dropout_seed", default=None)


@contextlib.contextmanager
def dropout_scope(seed, number):
    """Let `drop` work inside of a block.

    Args:
        seed: int tensor of two, of a `keras.random.SeedGenerator`; `None`
            drops nothing.
        number: int or scalar tensor, which block it is.
    """
    if seed is not None:
        number = ops.cast(number, seed.dtype)
        # Large primes: backends that add both halves of a seed must not meet
        # another layer's seed a few steps later.
        seed = seed + ops.stack([number * 15_485_863, ops.zeros_like(number)])
    token = _SEED.set(seed)
    try:
        yield
    finally:
        _SEED.reset(token)


def drop(x, rate, place):
    """Zero a share of `x` and scale up the rest, where `dropout_scope` is on.

    Args:
        x: tensor.
        rate: float.
        place: str, who asks; the parts of a block drop independently.
    """
    seed = _SEED.get()
    if seed is None or not rate:
        return x
    part = place.rsplit("block/", 1)[-1]
    salt = zlib.crc32(part.encode()) % 2**20 * 1009
    seed = seed + ops.convert_to_tensor([salt, 0], dtype=seed.dtype)
    return keras.random.dropout(x, rate, seed=_Given(seed))


class _Given(keras.random.SeedGenerator):
    """A seed that is known already, in the form that Keras takes."""

    def __init__(self, value):
        self.value = value
        # Not `None`, at which Keras on Torch takes a seed of its own.
        self._initial_seed = 0

    def next(self, ordered=True):
        return self.value
