"""The key-value cache: written in place, in the compute dtype or in int8."""

from typing import NamedTuple

import keras
from keras import ops

from keras_paligemma.types import Tensor

CACHE_DTYPES = (None, "int8")


def check_cache_dtype(cache_dtype):
    """Raise a `ValueError` for a dtype that caches do not have."""
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(
            f"Unknown dtype of the cache. Expected: one of {CACHE_DTYPES}. "
            f"Received: cache_dtype={cache_dtype!r}."
        )


class Int8Heads(NamedTuple):
    """Keys or values in int8, with a scale for each token and head.

    Args:
        codes: int8 tensor (…, S, K, H).
        scales: float32 tensor (…, S, K, 1); a head is codes times its scale.
    """

    codes: Tensor
    scales: Tensor


def empty_heads(shape, dtype):
    """Return zeros of keys or values (…, S, K, H).

    Args:
        shape: tuple of ints.
        dtype: str; "int8" returns `Int8Heads`.
    """
    if dtype != "int8":
        return ops.zeros(shape, dtype)
    return Int8Heads(
        ops.zeros(shape, "int8"), ops.zeros((*shape[:-1], 1), "float32")
    )


def to_int8(heads):
    """Round keys or values (…, S, K, H) to `Int8Heads`.

    Example:
        >>> print(ops.convert_to_numpy(to_int8(ops.array([0.5, -1.0])).codes))
        [  64 -127]
    """
    heads = ops.cast(heads, "float32")
    largest = ops.max(ops.absolute(heads), axis=-1, keepdims=True)
    # Avoids division by zero where all values are zero, as in padding.
    scales = ops.maximum(largest, 1e-30) / 127
    return Int8Heads(ops.cast(ops.round(heads / scales), "int8"), scales)


def write_cache(cache, key_BTKH, value_BTKH, index):
    """Write new keys and values into a cache, in place under compilation.

    A cache is `(keys, values, layer)`. In unrolled stacks each block has
    arrays (B, S, K, H) and `layer=None`. Scanned blocks share arrays
    (B, layers, S, K, H) with `layer` as the index, so nothing is restacked.
    Either may be `Int8Heads`, whose keys and values are rounded when written.

    Args:
        cache: the tuple above.
        key_BTKH: tensor to write at S positions index … index + T - 1.
        value_BTKH: as `key_BTKH`.
        index: int or int tensor, the first position to write.

    Returns:
        The cache after writing.
    """
    keys, values, layer = cache

    def write(cached, new_BTKH):
        if isinstance(cached, Int8Heads):
            return Int8Heads(*map(write, cached, to_int8(new_BTKH)))
        new_BTKH = ops.cast(new_BTKH, cached.dtype)
        if keras.backend.backend() == "tensorflow":
            return _scatter(cached, new_BTKH, layer, index)
        if layer is None:
            if keras.backend.backend() == "torch":
                return _copy_into(cached, new_BTKH, index)
            return ops.slice_update(cached, (0, index, 0, 0), new_BTKH)
        start = (0, layer, index, 0, 0)
        return ops.slice_update(cached, start, new_BTKH[:, None])

    return write(keys, key_BTKH), write(values, value_BTKH), layer


def _copy_into(cached, new_BTKH, index):
    """Write into a cache in place; Torch's `slice_update` copies it first."""
    numbers_T = ops.arange(new_BTKH.shape[1], dtype="int32")
    places_T = ops.cast(index + numbers_T, "int64")
    return cached.index_copy_(1, places_T, new_BTKH)


def _scatter(cached, new_BTKH, layer, index):
    """Write into a cache by TensorFlow's own scatter.

    Without XLA compilation, `slice_update` calls XLA each time: that is slow,
    and TensorFlow Serving may be built without it.
    """
    B, T = ops.shape(new_BTKH)[:2]
    # Explicit, since a 16-bit floatx makes plain integers int16.
    rows_B = ops.arange(B, dtype="int32")
    columns_T = index + ops.arange(T, dtype="int32")
    places = [rows_B[:, None], columns_T[None]]
    if layer is not None:
        places.insert(1, layer)
    places = [ops.broadcast_to(place, (B, T)) for place in places]
    return ops.scatter_update(cached, ops.stack(places, -1), new_BTKH)


def read_cache(cache):
    """Return the keys and values (B, S, K, H) of one layer."""
    keys, values, layer = cache
    if layer is None:
        return keys, values
    return keras.tree.map_structure(
        lambda array: ops.take(array, layer, axis=1), (keys, values)
    )
