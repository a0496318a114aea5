"""Masks as bool arrays of a picture, from and to what data sets hold.

A data set's masks are polygons or run lengths, as COCO has them; or a picture
whose values number the objects, see `tasks.label_maps`.
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


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Find the box of a mask, in whole pixels.

    Args:
        mask: bool array (height, width).

    Returns:
        (y1, x1, y2, x2), the ends exclusive.

    Raises:
        ValueError: the mask is no such array, or empty.

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
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    edges = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
    x1, y1, x2, y2 = (int(edge) for edge in edges)
    return x1, y1, x2, y2


def paste(
    part: np.ndarray,
    edges: Sequence[int],
    size: tuple[int, int],
) -> np.ndarray:
    """Put a mask that fills a box onto a picture.

    Args:
        part: bool array, or floats that are above 0 in the object, such as
            `MaskCodec.decode` gives; (height, width) of any size: it is
            resized bilinearly, by Pillow as in the original.
        edges: (y1, x1, y2, x2) in whole pixels, the ends exclusive. A box of
            no pixels gives an empty mask.
        size: (height, width) of the picture, pixels.

    Returns:
        bool array of this size.

    Raises:
        ValueError: the box is not inside the picture.

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
    """Read what COCO's `segmentation` holds: polygons or run lengths.

    Args:
        segmentation: list, as `from_polygons` takes it, or dict, as `from_rle`
            does.
        size: (height, width) of the picture, pixels.

    Returns:
        bool array of this size.

    Raises:
        ValueError: there is no mask, or it is damaged or of another size.
        ImportError: pycocotools is missing.

    Example:

    >>> int(from_segmentation([[0, 0, 2, 0, 2, 1, 0, 1]], (2, 3)).sum())
    2
    """
    if isinstance(segmentation, Mapping):
        return from_rle(segmentation, size)
    if isinstance(segmentation, Sequence) and not isinstance(segmentation, str):
        return from_polygons(segmentation, size)
    raise ValueError(
        "This is no mask. Expected: a list of polygons, or a dictionary of "
        f"run lengths. Received: {segmentation!r:.80}."
    )


def check_segmentation(
    segmentation: Sequence | Mapping | None, size: tuple[float, float]
) -> None:
    """Refuse what `from_segmentation` would, without drawing polygons.

    Args and errors are those of `from_segmentation`; run lengths of no pixel
    are refused, too.
    """
    if isinstance(segmentation, Mapping):
        bounds(from_rle(segmentation, size))
    elif isinstance(segmentation, Sequence) and not isinstance(
        segmentation, str
    ):
        for number, polygon in enumerate(segmentation):
            _flat(number, polygon)
    else:
        from_segmentation(segmentation, size)


def from_polygons(
    polygons: Iterable[Sequence[float]], size: tuple[float, float]
) -> np.ndarray:
    """Fill polygons: what is in one of them is in the mask.

    Args:
        polygons: lists of x1, y1, x2, y2, …, three points or more each, in
            pixels, or arrays (points, 2) of (x, y).
        size: (height, width) of the picture, pixels.

    Returns:
        bool array of this size. What sticks out of the picture is cut off.

    Raises:
        ValueError: there is no polygon, or one is none.
        ImportError: pycocotools is missing.

    Example:

    >>> from_polygons([[0, 0, 2, 0, 2, 1, 0, 1]], (1, 3)).tolist()
    [[True, True, False]]

    Source: COCO's rule of which pixels a polygon covers, by pycocotools.
    """
    flat = [_flat(number, one) for number, one in enumerate(polygons)]
    if not flat:
        raise ValueError(
            "There is no mask. Expected: one polygon or more. Received: none."
        )
    codec = import_pycocotools()
    runs = codec.merge(codec.frPyObjects(flat, *map(int, size)))
    return codec.decode(runs).astype(bool)


def to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace a mask along its pixels' edges: `from_polygons` gives it again.

    Polygons have no holes. A part with a hole is cut in two through it.

    Args:
        mask: bool array (height, width).

    Returns:
        List of polygons x1, y1, x2, y2, …, pixels; empty for an empty mask.

    Raises:
        ValueError: the mask is no such array.

    Example:

    >>> to_polygons(np.array([[0, 1, 1]], bool))
    [[1.0, 0.0, 3.0, 0.0, 3.0, 1.0, 1.0, 1.0]]
    """
    return _polygons(check_mask(mask), 0)


def from_rle(
    runs: Mapping, size: tuple[float, float] | None = None
) -> np.ndarray:
    """Read COCO's run lengths, packed or as a list of numbers.

    Not by pycocotools, which of damaged run lengths gives what was in memory
    before, or ends the process.

    Args:
        runs: dict of `size`, (height, width), and `counts`.
        size: (height, width) that the mask must have; `None` takes any.

    Returns:
        bool array (height, width).

    Raises:
        ValueError: the runs are none, or of another size.

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
    # Runs go down the columns, and begin with the background.
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def to_rle(mask: np.ndarray) -> dict:
    """Write a mask as COCO's packed run lengths, ready for JSON.

    Args:
        mask: bool array (height, width).

    Returns:
        Dict of `size`, [height, width], and `counts`, a str.

    Raises:
        ValueError: the mask is no such array.
        ImportError: pycocotools is missing.

    Example:

    >>> to_rle(np.ones((2, 2), bool))
    {'size': [2, 2], 'counts': '04'}
    """
    pixels = np.asfortranarray(check_mask(mask), "uint8")
    runs: Any = import_pycocotools().encode(pixels)
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def _unpack(packed):
    """Run lengths of COCO's string: numbers of 5 bits a character.

    A sixth bit says that the number goes on. From the fourth run on they are
    differences to the run before the last.
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
    """Refuse what is no bool array (height, width)."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(
            "A mask is a bool array (height, width). Received: "
            f"{mask.dtype} {mask.shape}."
        )
    return mask


def _flat(number, polygon):
    """The numbers of a polygon; refuse what is none."""
    try:
        flat = np.asarray(polygon, "float64").reshape(-1).tolist()
    except (TypeError, ValueError):
        flat = []
    if len(flat) < 6 or len(flat) % 2 or not np.isfinite(flat).all():
        raise ValueError(
            f"Polygon {number} is none. Expected: numbers x, y of three "
            f"points or more. Received: {polygon!r:.80}."
        )
    return flat


def import_pycocotools() -> ModuleType:
    """Return `pycocotools.mask`, or say how to install it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "Polygons and run lengths need pycocotools. Install it with "
            "`pip install 'keras_paligemma[eval]'`."
        ) from error
    return mask


def _polygons(mask, left):
    """Polygons of a part of a mask that begins at a column."""
    loops = loops_of(mask)
    holes = [loop for loop in loops if area_of(loop) < 0]
    if not holes:
        moved = [loop[:, ::-1] + (left, 0) for loop in loops]
        return [loop.reshape(-1).astype(float).tolist() for loop in moved]
    # The middle one, so that the halves are of about one size.
    column = (
        int(sorted(loop[:, 1].min() for loop in holes)[len(holes) // 2]) + 1
    )
    return _polygons(mask[:, :column], left) + _polygons(
        mask[:, column:], left + column
    )
