"""The resize methods that checkpoints were trained with, exact to the pixel."""

import functools

import numpy as np
from PIL import Image

# All arithmetic is float32 and in the order of TensorFlow's kernels: results
# are truncated, so one more rounding would change a pixel.
_HALF = np.float32(0.5)
_ONE = np.float32(1)


def bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by bilinear interpolation without antialias.

    When a picture shrinks, pixels are skipped and small print becomes
    illegible.

    Args:
        image: uint8 array (height, width, channels).
        size: `(height, width)` of the result, in pixels.

    Returns:
        uint8 array (*size, channels), truncated.

    Example:

    >>> int(bilinear(np.full((5, 7, 3), 9, "uint8"), (2, 4)).max())
    9

    Source: big_vision `pp/ops_image.py`, `resize(size)`, the default there;
    `tf.image.resize`.
    """
    top, bottom, y = _neighbours(image.shape[0], size[0])
    left, right, x = _neighbours(image.shape[1], size[1])
    x, y = x[:, None], y[:, None, None]

    def along(rows):
        start = rows.take(left, 1).astype("float32")
        return start + (rows.take(right, 1) - start) * x

    upper = along(image.take(top, 0))
    return (upper + (along(image.take(bottom, 0)) - upper) * y).astype("uint8")


def bilinear_antialias(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by bilinear interpolation with antialias (a triangle filter).

    Args:
        image: uint8 array (height, width, channels).
        size: `(height, width)` of the result, in pixels.

    Returns:
        uint8 array (*size, channels), truncated.

    Example:

    >>> int(bilinear_antialias(np.full((5, 7, 3), 9, "uint8"), (9, 9)).max())
    9

    Source: big_vision `pp/ops_image.py`, `resize(size, antialias=True)`,
    what `configs/proj/paligemma` asks for; `tf.image.resize`.
    """
    return resample(image, size).astype("uint8")


def resample(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize as `bilinear_antialias`, without the truncation to uint8.

    Args:
        image: uint8 array (height, width, channels).
        size: `(height, width)` of the result, in pixels.

    Returns:
        float32 array (*size, channels), in the range of the image.

    Example:

    >>> resample(np.array([[[0], [255]]], "uint8"), (1, 1)).item()
    127.5
    """
    for axis in (0, 1):
        index, weights = _triangles(image.shape[axis], size[axis])
        shape = (-1, 1, 1) if axis == 0 else (-1, 1)
        image = sum(  # pyright: ignore[reportAssignmentType] never empty
            image.take(taps, axis) * weight.reshape(shape)
            for taps, weight in zip(index, weights, strict=True)
        )
    return image


def bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by Pillow's 8-bit bicubic filter, which has antialias.

    Args:
        image: uint8 array (height, width, 3).
        size: `(height, width)` of the result, in pixels.

    Returns:
        uint8 array (*size, 3), rounded.

    Example:

    >>> int(bicubic(np.full((5, 7, 3), 9, "uint8"), (2, 4)).max())
    9

    Source: transformers `SiglipImageProcessor` as PaliGemma configures it.
    """
    resized = Image.fromarray(image).resize(
        (size[1], size[0]), Image.Resampling.BICUBIC
    )
    return np.asarray(resized)


RULES = {
    "bilinear": bilinear,
    "bilinear_antialias": bilinear_antialias,
    "bicubic": bicubic,
}


@functools.lru_cache(maxsize=256)
def _neighbours(source, target):
    """Return each output's lower and upper index, and the upper's weight."""
    scale = np.float32(source) / np.float32(target)
    centre = (np.arange(target, dtype="float32") + _HALF) * scale - _HALF
    floor = np.floor(centre)
    lower = np.maximum(floor, 0).astype("int64")
    upper = np.minimum(np.ceil(centre), source - 1).astype("int64")
    return lower, upper, centre - floor


@functools.lru_cache(maxsize=256)
def _triangles(source, target):
    """Return indices and weights (taps, target); padding has weight 0."""
    step = _ONE / (np.float32(target) / np.float32(source))
    radius = max(step, _ONE)
    centre = (np.arange(target, dtype="float32") + _HALF) * step
    first = np.maximum(np.ceil(centre - radius - _HALF), 0)
    last = np.minimum(np.floor(centre + radius - _HALF), source - 1)
    taps = np.arange(int((last - first).max()) + 1, dtype="float32")[:, None]
    index = first + taps
    distance = np.abs((index + _HALF - centre) * (_ONE / radius))
    weights = np.where(index <= last, np.maximum(_ONE - distance, 0), 0)
    total = sum(weights)  # In order, unlike `np.sum`.
    index = np.minimum(index, source - 1).astype("int64")
    return index, weights * (_ONE / total)
