"""Convert masks between bool arrays, polygons and run lengths.

Polygons and run lengths are those of COCO. For pictures whose values are
numbers of objects, see `tasks.label_maps`.
"""

import operator
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from keras_paligemma.tasks.outlines import area_of
from keras_paligemma.tasks.outlines import loops_of

# The farthest corner of a polygon, pixels. pycocotools draws the edges outside
# of the picture too: for want of memory, it ends the process.
_FARTHEST = 1_000_000


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the smallest box around a mask, in whole pixels.

    Args:
        mask: bool array (height, width).

    Returns:
        (y1, x1, y2, x2), with exclusive ends.

    Raises:
        ValueError: if the mask is not such an array, or empty.

    Example:

    >>> bounds(np.array([[0, 0, 0], [0, 1, 1]], bool))
    (1, 1, 2, 3)
    """
    mask = check_mask(mask)
    if not mask.any():
        raise ValueError(
            "An empty mask has no box. Expected: one pixel or more. Received: "
            f"none of {mask.shape[0]} × {mask.shape[1]}."
        )
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() for axis in (1, 0))
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def paste(
    part: np.ndarray,
    edges: Sequence[int],
    size: tuple[int, int],
) -> np.ndarray:
    """Resize a mask that fills a box, and place it in a picture.

    Args:
        part: array (height, width) of any size: bool, or float, above 0 inside
            the object, as `MaskCodec.decode` returns. It is resized
            bilinearly by Pillow, as in the original.
        edges: (y1, x1, y2, x2) in whole pixels, with exclusive ends. The mask
            of a box without pixels is empty.
        size: (height, width) of the picture, pixels.

    Returns:
        bool array (height, width) of the picture.

    Raises:
        ValueError: if the box is not inside the picture.

    Example:

    >>> paste(np.ones((64, 64)), (0, 1, 1, 2), (1, 3)).tolist()
    [[False, True, False]]

    Source: big_vision `evaluators/proj/paligemma/transfers/segmentation.py`.
    """
    y1, x1, y2, x2 = edges
    if not (0 <= y1 <= y2 <= size[0] and 0 <= x1 <= x2 <= size[1]):
        raise ValueError(
            "The box of a mask is not inside its picture. Expected: (y1, x1, "
            f"y2, x2) within {tuple(size)}. Received: {tuple(edges)}."
        )
    mask = np.zeros(size, bool)
    shape = (y2 - y1, x2 - x1)
    if 0 in shape:
        return mask
    part = np.asarray(part)
    if part.shape != shape:
        values = 2 * part.astype("f4") - 1 if part.dtype == bool else part
        picture = Image.fromarray(np.asarray(values, "float32"))
        part = np.asarray(
            picture.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        )
    mask[y1:y2, x1:x2] = part > 0
    return mask


def from_segmentation(
    segmentation: Sequence | Mapping | None, size: tuple[float, float]
) -> np.ndarray:
    """Convert COCO's `segmentation`, polygons or run lengths, to a mask.

    Args:
        segmentation: list, as `from_polygons` takes it, or dict, as `from_rle`
            takes it.
        size: (height, width) of the picture, pixels.

    Returns:
        bool array (height, width) of the picture.

    Raises:
        ValueError: if there is no mask, or it is damaged or of another size.
        ImportError: if pycocotools is not installed.

    Example:

    >>> int(from_segmentation([[0, 0, 2, 0, 2, 1, 0, 1]], (2, 3)).sum())
    2
    """
    if isinstance(segmentation, Mapping):
        return from_rle(segmentation, size)
    return from_polygons(_check_list(segmentation), size)


def check_segmentation(
    segmentation: Sequence | Mapping | None, size: tuple[float, float]
) -> None:
    """Raise the errors of `from_segmentation`, without drawing polygons.

    Args and errors are those of `from_segmentation`. Run lengths without a
    pixel raise a ValueError, too.
    """
    if isinstance(segmentation, Mapping):
        bounds(from_rle(segmentation, size))
        return
    for number, polygon in enumerate(_check_list(segmentation)):
        _flat(number, polygon)


def _check_list(segmentation):
    """Return polygons; raise if there is no list of them."""
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise ValueError(
            "This is no mask. Expected: a list of polygons, or a dictionary of "
            f"run lengths. Received: {segmentation!r:.80}."
        )
    return segmentation


def from_polygons(
    polygons: Iterable[Sequence[float]], size: tuple[float, float]
) -> np.ndarray:
    """Convert polygons to a mask, their union.

    Args:
        polygons: lists of x1, y1, x2, y2, …, in pixels, or arrays (points, 2)
            of (x, y), with at least three points each.
        size: (height, width) of the picture, pixels.

    Returns:
        bool array (height, width) of the picture. Parts outside of it are cut
        off.

    Raises:
        ValueError: if there is no polygon, or one is invalid.
        ImportError: if pycocotools is not installed.

    Example:

    >>> from_polygons([[0, 0, 2, 0, 2, 1, 0, 1]], (1, 3)).tolist()
    [[True, True, False]]

    Source: pycocotools decides which pixels a polygon covers, as for COCO.
    """
    flat = [_flat(number, polygon) for number, polygon in enumerate(polygons)]
    if not flat:
        raise ValueError(
            "There is no mask. Expected: one polygon or more. Received: none."
        )
    codec = import_pycocotools()
    runs = codec.merge(codec.frPyObjects(flat, *map(int, size)))
    return codec.decode(runs).astype(bool)


def to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Convert a mask to polygons along the edges of its pixels.

    `from_polygons` restores the same mask. Polygons have no holes, so a part
    with a hole is cut in two through the hole.

    Args:
        mask: bool array (height, width).

    Returns:
        list of polygons x1, y1, x2, y2, …, pixels; empty for an empty mask.

    Raises:
        ValueError: if the mask is not such an array.

    Example:

    >>> to_polygons(np.array([[0, 1, 1]], bool))
    [[1.0, 0.0, 3.0, 0.0, 3.0, 1.0, 1.0, 1.0]]
    """
    return _polygons(check_mask(mask), 0)


def from_rle(
    runs: Mapping, size: tuple[float, float] | None = None
) -> np.ndarray:
    """Convert COCO's run lengths, packed or as a list of numbers, to a mask.

    pycocotools is not used: for damaged run lengths it returns uninitialised
    memory or ends the process.

    Args:
        runs: dict with `size`, (height, width), and `counts`.
        size: (height, width) that the mask must have; `None` accepts any.

    Returns:
        bool array (height, width).

    Raises:
        ValueError: if the run lengths are damaged, or of another size.

    Example:

    >>> from_rle({"size": [1, 3], "counts": [1, 2]}).tolist()
    [[False, True, True]]
    """
    try:
        height, width = (operator.index(side) for side in runs["size"])
        counts = runs["counts"]
        if isinstance(counts, (str, bytes)):
            counts = _unpack(counts)
        counts = [operator.index(count) for count in counts]
        if min(height, width, *counts) < 0 or sum(counts) != height * width:
            raise ValueError(f"runs of {sum(counts)} pixels")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "These are no run lengths of a mask. Expected: a dictionary of "
            "'size', (height, width), and 'counts', a string or numbers that "
            f"add up to all pixels. Received: {runs!r:.120} ({error})."
        ) from error
    if size is not None and (height, width) != tuple(size):
        raise ValueError(
            f"The mask has another size than the picture. Expected: {size}. "
            f"Received: {(height, width)}."
        )
    # Runs go column by column, and start with the background.
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def to_rle(mask: np.ndarray) -> dict:
    """Convert a mask to COCO's packed run lengths, ready for JSON.

    Args:
        mask: bool array (height, width).

    Returns:
        dict with `size`, [height, width], and `counts`, a str.

    Raises:
        ValueError: if the mask is not such an array.
        ImportError: if pycocotools is not installed.

    Example:

    >>> to_rle(np.ones((2, 2), bool))
    {'size': [2, 2], 'counts': '04'}
    """
    pixels = np.asfortranarray(check_mask(mask), "uint8")
    runs: Any = import_pycocotools().encode(pixels)
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def _unpack(packed):
    """Return the run lengths in COCO's string.

    Each character holds 5 bits of a number, and a sixth bit if more follow.
    From the fourth run on, a number is the difference from the run two before.
    """
    packed = packed.encode() if isinstance(packed, str) else packed
    runs, number, place = [], 0, 0
    for byte in packed:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(byte)!r}")
        number |= (bits & 31) << place
        place += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << place
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, place = 0, 0
    if place:
        raise ValueError("cut off")
    return runs


def check_mask(mask: np.ndarray) -> np.ndarray:
    """Return a mask; raise a ValueError if it is not bool (height, width)."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            "A mask is a bool array (height, width). Received: "
            f"{mask.dtype} {mask.shape}."
        )
    return mask


def _flat(number, polygon):
    """Return the numbers of a polygon; raise if it is invalid."""
    try:
        flat = np.asarray(polygon, "float64").reshape(-1).tolist()
    except (TypeError, ValueError):
        flat = []
    is_near = all(abs(edge) <= _FARTHEST for edge in flat)  # False for NaN.
    if len(flat) < 6 or len(flat) % 2 or not is_near:
        raise ValueError(
            f"Polygon {number} is none. Expected: numbers x, y of three "
            f"points or more, up to {_FARTHEST:,} pixels. Received: "
            f"{polygon!r:.80}."
        )
    return flat


def import_pycocotools() -> ModuleType:
    """Return `pycocotools.mask`; the error says how to install it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "Polygons and run lengths need pycocotools. Install it with "
            "`pip install 'keras_paligemma[eval]'`."
        ) from error
    return mask


def _polygons(mask, left):
    """Return the polygons of a slice of a mask that starts at column `left`."""
    loops = loops_of(mask)
    holes = [loop for loop in loops if area_of(loop) < 0]
    if not holes:
        moved = [loop[:, ::-1] + (left, 0) for loop in loops]
        return [loop.reshape(-1).astype(float).tolist() for loop in moved]
    # Cut at the median hole, so that both halves have about the same size.
    starts = sorted(int(loop[:, 1].min()) for loop in holes)
    column = starts[len(starts) // 2] + 1
    return [
        *_polygons(mask[:, :column], left),
        *_polygons(mask[:, column:], left + column),
    ]
