"""Detection of NaN and infinite values while arrays are read and cast."""

import ml_dtypes
import numpy as np

# The bits of infinity without the sign; the bits of NaN are greater.
INFINITY = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F80_0000,
    "float64": 0x7FF0_0000_0000_0000,
}
# The largest value of float16.
HALF = 65504
# Bytes per step, which stay in a core's cache between two passes.
CHUNK = 1 << 20


def all_finite(array):
    """Return whether all values are finite; integers always are.

    The bits are compared as integers: that is vectorised for all float dtypes
    and allocates no array.

    Args:
        array: `np.ndarray`.

    Returns:
        bool.

    Example:
        >>> all_finite(np.array([1.0, np.inf]))
        False
    """
    infinity = INFINITY.get(array.dtype.name)
    if infinity is None or not array.size:
        return True
    # A view in the order of memory, if there is one.
    flat = array.ravel("K")
    size = flat.itemsize
    signed, unsigned = flat.view(f"i{size}"), flat.view(f"u{size}")
    negative = infinity | 1 << (8 * size - 1)
    step = CHUNK // size
    return all(
        signed[start : start + step].max() < infinity
        and unsigned[start : start + step].max() < negative
        for start in range(0, flat.size, step)
    )


def _is_within(array, most):
    return -most <= array.min(initial=0) and array.max(initial=0) <= most


def cast(key, array, dtype):
    """Cast an array of floats, unless values would become infinite.

    Args:
        key: str, named in the error.
        array: `np.ndarray`; its own NaN and infinite values are kept.
        dtype: NumPy dtype.

    Returns:
        `np.ndarray`; `array` itself if it has that dtype.

    Raises:
        ValueError: a value is larger than any of the dtype.
    """
    with np.errstate(over="ignore"):
        found = array.astype(dtype, copy=False)
    if found is array or all_finite(found):
        return found
    lost = np.abs(array[np.isinf(found) & np.isfinite(array)])
    if lost.size:
        most = float(ml_dtypes.finfo(found.dtype).max)
        raise ValueError(
            f"{key!r} holds {lost.size} values of {array.size} that "
            f"{found.dtype} cannot hold. Received: up to "
            f"{float(lost.max()):.6g}. Expected: at most {most:.6g}. Use "
            "bfloat16, which has the range of float32, or float32 itself."
        )
    return found


class Finite:
    """The tensors of a checkpoint; reading one that is not finite raises.

    Args:
        tensors: see `engine`.
        source: str or path, named in errors.
        dtype: str, the dtype that they are cast to later, or `None`.
    """

    def __init__(self, tensors, source, dtype=None):
        self._tensors, self._source = tensors, source
        self._dtype = dtype
        self.shapes, self.dtypes = tensors.shapes, tensors.dtypes
        if hasattr(tensors, "read_rows"):
            self.read_rows = self._read_rows

    def read(self, key):
        return self._checked(key, self._tensors.read(key))

    def _read_rows(self, key, start, stop):
        rows = self._tensors.read_rows(key, start, stop)
        return self._checked(key, rows)

    def _checked(self, key, array):
        if all_finite(array):
            # All other dtypes have a larger range. Most arrays are within this
            # one, and need no copy.
            if self._dtype == "float16" and not _is_within(array, HALF):
                cast(key, array, self._dtype)
            return array
        count = array.size - np.count_nonzero(np.isfinite(array))
        raise ValueError(
            f"{self._source}: {key!r} holds {count} values of {array.size} "
            "that are NaN or infinite. Expected: finite numbers. A training "
            "that diverged, or float16 that overflowed, leaves such weights: "
            "take an earlier checkpoint, or look into this one with "
            "`allow_nonfinite=True`."
        )
