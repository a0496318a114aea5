"""Reading pictures of any kind as uint8 RGB."""

import base64
import io
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from keras_paligemma.preprocessing.inputs import is_numeric
from keras_paligemma.preprocessing.inputs import to_numpy

# Longer names are shortened in errors: a data: URI may have megabytes.
_LONGEST_NAME = 300
# Each scan of a JPEG is a pass over all of its pixels. Encoders write about 10;
# servers refuse more than this.
MOST_SCANS = 64
# How a picture of each EXIF orientation is turned upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(image, name: str = "image") -> np.ndarray:
    """Read a picture of any kind as 8-bit RGB.

    Files are decoded, rotated by their EXIF orientation, unless it is broken,
    and converted to three channels. Transparency is dropped, not blended, as
    in the original: transparent pixels become visible. 16-bit pictures are
    scaled to 8 bits, not clipped. Animations are read as their first frame.
    Training, generation and drawing all read pictures with this function.

    Args:
        image: a path or URI, see `picture_path`; bytes of an encoded file; a
            file opened in binary mode, which is read from its start and left
            open; a dict of `bytes` or `path`, as Hugging Face's data sets
            store pictures; `PIL.Image.Image`; or an array or tensor of shape
            (height, width), or (height, width, channels) with 1, 3 or 4
            channels. Integers and floats are 0…255, uint16 is 0…65535.
        name: str, name of the picture in errors.

    Returns:
        uint8 array of shape (height, width, 3).

    Raises:
        ValueError: the picture cannot be read, or has invalid values or shape.

    Example:

    >>> read_image(np.zeros((4, 6), "uint8")).shape
    (4, 6, 3)
    """
    if isinstance(image, Mapping) and not {"bytes", "path"}.isdisjoint(image):
        image = _stored(image, name)
    if isinstance(image, (str, os.PathLike)):
        name = f"{name} ({_shown(os.fspath(image))})"
    if isinstance(
        image, (str, os.PathLike, bytes, bytearray, Image.Image)
    ) or hasattr(image, "read"):
        pixels = _decode(image, name)
    else:
        pixels = to_numpy(image)
    pixels = to_rgb(to_bytes(pixels, name), name)
    if pixels.ndim > 3:
        raise ValueError(
            f"{name} is several pictures. Expected: one, (height, width) or "
            f"(height, width, channels). Received: shape {pixels.shape}."
        )
    return pixels


def picture_path(name: str | os.PathLike[str], folder: str = "") -> str:
    """Return the path of a picture named in a data set.

    Args:
        name: a path, also one of Windows: backslashes are separators unless a
            file has them in its name; a `file://` URI; or a `data:` URI, which
            holds the file itself.
        folder: str, folder that paths are relative to.

    Returns:
        str: a path; URIs other than `file://` are returned unchanged.

    Example:

    >>> picture_path("file:///data/a%20cat.jpg")
    '/data/a cat.jpg'
    >>> picture_path("train\\\\cat.jpg", "data")
    'data/train/cat.jpg'
    """
    name = os.fspath(name)
    if name.startswith("file:"):
        name = name.removeprefix("file:").removeprefix("//")
        name = unquote(name.removeprefix("localhost"))
    elif is_uri(name):
        return name
    path = os.path.join(folder, name)
    if "\\" in path and os.sep != "\\" and not os.path.exists(path):
        path = path.replace("\\", "/")
    return path


def is_uri(path: str) -> bool:
    """Return whether a path that `picture_path` returned is a URI."""
    return path.startswith("data:") or "://" in path[:16]


def openable(
    image: str | os.PathLike[str] | bytes | io.IOBase,
) -> Any:
    """Return an encoded picture as an argument of `PIL.Image.open`.

    Args:
        image: path or URI, bytes, or a file, as in `read_image`.

    Returns:
        Path, or a file opened in binary mode.

    Raises:
        ValueError: a URI of another kind, or invalid base64.
    """
    if isinstance(image, (str, os.PathLike)):
        image = picture_path(image)
        if "://" in image[:16]:
            raise ValueError(
                "an address, which is not fetched; download the file first"
            )
        if not image.startswith("data:"):
            return image
        head, _, body = image.partition(",")
        image = unquote_to_bytes(body)
        if head.endswith(";base64"):
            image = base64.b64decode(image)
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    return image


def orientation(image: Image.Image) -> int:
    """Return a picture's EXIF orientation.

    Args:
        image: `PIL.Image.Image`.

    Returns:
        int, 2 to 8; 1 if the picture is upright, or its EXIF is missing or
        broken.
    """
    try:
        value = image.getexif().get(Base.Orientation)
    except (MemoryError, OSError):
        raise
    except Exception:
        # Pillow parses EXIF without checks, so that broken EXIF raises errors
        # of many types. The pixels do not depend on it.
        return 1
    return value if value in _TURNS else 1


def to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """Convert the values of an array to uint8, 0…255.

    Args:
        array: NumPy array of numbers; see `read_image`.
        name: str, name of the array in errors.

    Returns:
        uint8 array of the same shape. Fractions are rounded.

    Raises:
        ValueError: values are outside 0…255, not finite, or floats that look
            like 0…1.

    Example:

    >>> to_bytes(np.array([65535], "uint16"), "image")
    array([255], dtype=uint8)
    """
    dtype = array.dtype.name
    if dtype == "uint8":
        return array
    if dtype == "uint16":
        return ((array.astype("uint32") + 128) // 257).astype("uint8")
    if not is_numeric(array):
        raise ValueError(
            f"{name} is not made of numbers. Expected: uint8, uint16, another "
            f"integer type or floats. Received: dtype {dtype}."
        )
    is_float = "float" in dtype
    # NumPy alone cannot compare bfloat16.
    array = array.astype("float32") if is_float else array
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 255):  # Also false for NaN.
        raise ValueError(
            f"{name} has values out of range. Expected: 0 to 255. Received: "
            f"{low} to {high}, dtype {dtype}."
        )
    if is_float and 0 < high <= 1:
        raise ValueError(
            f"{name} would be almost black. Expected: floats from 0 to 255. "
            f"Received: {low} to {high}. If it is scaled to [0, 1], multiply "
            "it by 255."
        )
    return np.rint(array).astype("uint8")


def to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array to three channels.

    Args:
        array: uint8 array (height, width), or (…, height, width, channels)
            with 1, 3 or 4 channels.
        name: str, name of the array in errors.

    Returns:
        uint8 array of shape (…, height, width, 3).

    Raises:
        ValueError: another shape.

    Example:

    >>> to_rgb(np.zeros((4, 6, 1), "uint8"), "image").shape
    (4, 6, 3)
    """
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim < 3 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"{name} has an unknown shape. Expected: (height, width) or "
            "(height, width, channels) with 1, 3 or 4 channels, channels "
            f"last. Received: {shape}."
        )
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    return array[..., :3]


def _stored(image, name):
    """Return bytes or path of a picture in a data set of Hugging Face."""
    for key in ("bytes", "path"):
        if image.get(key) is not None:
            return image[key]
    raise ValueError(
        f"{name} holds no picture. Expected: a dictionary with 'bytes' of an "
        f"encoded file, or its 'path'. Received: {image}."
    )


def _shown(name):
    """Return a name for errors, shortened if long."""
    if len(name) <= _LONGEST_NAME:
        return repr(name)
    return f"{name[:40]!r} and on, {len(name):,} characters"


def _decode(source, name):
    """Return the pixels of a file or of a Pillow image, which may be lazy."""
    try:
        if isinstance(source, Image.Image):
            return _pixels(source)
        with Image.open(openable(source)) as image:
            return _pixels(image)
    except MemoryError:
        raise
    except Exception as error:
        # Pillow has no common base class for errors of broken files; its
        # AVIF plugin, say, raises a RuntimeError. `strerror` lacks the file
        # name, which may be long.
        reason = getattr(error, "strerror", None) or error
        # No path holds a zero byte, and nearly all pictures do.
        if isinstance(source, bytes) and b"\0" not in source[:4096]:
            reason = f"{reason}. Bytes are a file's contents, not its path"
        raise ValueError(
            f"{name} could not be read. Expected: a whole PNG, JPEG, WebP, "
            "GIF or other picture that Pillow reads; base64 as a data: URI. "
            f"Received: {reason}"
        ) from error


def _pixels(image):
    image.load()
    turn = orientation(image)
    if turn != 1:
        image = image.transpose(_TURNS[turn])
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):
        # 16-bit files open in these modes too. Pillow's own conversion to
        # RGB would clip them at 255.
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(
                f"values from {pixels.min()} to {pixels.max()}, more than 16 "
                "bits hold"
            )
        if image.mode == "I" and 0 < pixels.max() <= 255:
            raise ValueError(
                f"values of 0 to {pixels.max()} in Pillow's mode 'I', which "
                "would be almost black in 16 bits; convert it by "
                "`Image.fromarray(np.asarray(image).astype('uint8'))`"
            )
        return pixels.astype("uint16")
    if "transparency" in image.info:
        # Otherwise Pillow warns that RGB loses the transparency.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
