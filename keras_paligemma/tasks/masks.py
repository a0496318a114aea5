"""Masks as bool arrays of a picture, from and to what data sets hold.

A data set's masks are polygons or run lengths (COCO), or a picture whose
values number the objects (a label map). All of them are whole pixels of one
picture here: bool arrays (height, width).
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# The four sides of a pixel, each from corner to corner with the pixel to the
# right of the way: (from, to) as offsets (y, x) of its upper left corner, and
# the neighbour (y, x) beyond.
_SIDES = (
    ((0, 0), (0, 1), (-1, 0)),
    ((0, 1), (1, 1), (0, 1)),
    ((1, 1), (1, 0), (1, 0)),
    ((1, 0), (0, 0), (0, -1)),
)


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
    mask = _mask(mask)
    if not mask.any():
        raise ValueError(
            "An empty mask has no box. Expected: one pixel or more. Received: "
            f"none of {mask.shape[0]} × {mask.shape[1]}."
        )
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    edges = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
    return tuple(int(edge) for edge in edges)


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
            picture.resize(shape[::-1], Image.Resampling.BILINEAR)
        )
    mask[y1:y2, x1:x2] = part > 0
    return mask


def from_segmentation(
    segmentation: Sequence | Mapping, size: tuple[int, int]
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


def from_polygons(
    polygons: Iterable[Sequence[float]], size: tuple[int, int]
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
    codec = _pycocotools()
    runs = codec.merge(codec.frPyObjects(flat, *size))
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
    return _polygons(_mask(mask), 0)


def from_rle(runs: Mapping, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read COCO's run lengths, packed or as a list of numbers.

    Args:
        runs: dict of `size`, (height, width), and `counts`.
        size: (height, width) that the mask must have; `None` takes any.

    Returns:
        bool array (height, width).

    Raises:
        ValueError: the runs are none, or of another size.
        ImportError: pycocotools is missing.

    Example:

    >>> from_rle({"size": [1, 3], "counts": [1, 2]}).tolist()
    [[False, True, True]]
    """
    codec = _pycocotools()
    try:
        height, width = (int(side) for side in runs["size"])
        if isinstance(runs["counts"], list):
            if sum(runs["counts"]) != height * width:
                raise ValueError(f"runs of {sum(runs['counts'])} pixels")
            runs = codec.frPyObjects(dict(runs), height, width)
        mask = codec.decode(runs).astype(bool)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "These are no run lengths of a mask. Expected: a dictionary of "
            "'size', (height, width), and 'counts', a string or numbers that "
            f"add up to all pixels. Received: {runs!r:.120} ({error})."
        ) from error
    if size is not None and mask.shape != tuple(size):
        raise ValueError(
            f"The mask has another size than the picture. Expected: {size}. "
            f"Received: {mask.shape}."
        )
    return mask


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
    runs = _pycocotools().encode(np.asfortranarray(_mask(mask), "uint8"))
    return {"size": list(runs["size"]), "counts": runs["counts"].decode()}


def from_label_map(
    picture: str | Path | Image.Image | np.ndarray,
    ignore: Iterable[int] = (0, 255),
) -> dict[int, np.ndarray]:
    """Separate a picture whose values number the objects.

    Args:
        picture: path, Pillow image or array: grey values or a palette's
            indices, also of 16 bits; of three channels, red + 256 green +
            65536 blue, as COCO's panoptic maps are.
        ignore: values that are no object: the background, and VOC's border.

    Returns:
        Dict of value to bool array (height, width), by value.

    Raises:
        ValueError: the picture cannot be read, or is no map.

    Example:

    >>> found = from_label_map(np.array([[0, 7], [7, 255]], "uint8"))
    >>> {value: int(mask.sum()) for value, mask in found.items()}
    {7: 2}
    """
    values = _values(picture)
    ignored = set(ignore)
    found = [v for v in np.unique(values).tolist() if v not in ignored]
    return {value: values == value for value in found}


def to_label_map(masks: Mapping[int, np.ndarray]) -> Image.Image:
    """Write masks that do not overlap as one picture.

    Args:
        masks: dict of value, 1 to 65535, to bool array; all of one size. A
            reader must not ignore the values: VOC's ignores 255.

    Returns:
        `PIL.Image.Image` of 8 bits, or of 16 where a value needs them; what
        is in no mask is 0.

    Raises:
        ValueError: masks overlap, which a map cannot hold, or are of
            different sizes, or a value does not fit.

    Example:

    >>> to_label_map({7: np.ones((2, 3), bool)}).size
    (3, 2)
    """
    masks = {value: _mask(mask) for value, mask in masks.items()}
    shapes = {mask.shape for mask in masks.values()}
    if len(shapes) != 1 or not all(0 < value < 65536 for value in masks):
        raise ValueError(
            "A map holds one mask or more, of one size, numbered 1 to 65535. "
            f"Received: sizes {sorted(shapes)}, numbers {list(masks)[:9]}."
        )
    values = np.zeros(shapes.pop(), "uint16")
    for value, mask in masks.items():
        if values[mask].any():
            raise ValueError(
                "A map cannot hold masks that overlap. Received: mask "
                f"{value} over mask {values[mask].max()}. Write run lengths, "
                "or cut one of them."
            )
        values[mask] = value
    small = max(masks) < 256
    return Image.fromarray(values.astype("uint8") if small else values)


def _mask(mask):
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


def _pycocotools():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "Polygons and run lengths need pycocotools. Install it with "
            "`pip install 'keras_paligemma[eval]'`."
        ) from error
    return mask


def _values(picture):
    """The numbers of a map, (height, width)."""
    try:
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as opened:
                values = np.asarray(opened)
        else:
            values = np.asarray(picture)
    except OSError as error:
        raise ValueError(f"The map cannot be read: {error}.") from error
    if values.ndim == 3 and values.shape[-1] == 3:
        values = values.astype("int64") @ (1, 256, 65536)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            "This is no map of objects. Expected: a picture of one channel "
            "or three, of whole numbers. Received: "
            f"{values.dtype} {values.shape}."
        )
    return values


def _polygons(mask, left):
    """Polygons of a part of a mask that begins at a column."""
    loops = _loops(mask)
    holes = [loop for loop in loops if _area(loop) < 0]
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


def _loops(mask):
    """Walk around all parts of a mask, the object to the right of the way.

    Returns:
        List of int arrays (corners, 2) of (y, x): clockwise around parts,
        whose `_area` is positive, and the other way around holes. Pixels that
        touch at a corner alone are different parts.
    """
    padded = np.pad(mask, 1)
    targets = {}
    for start, end, (y, x) in _SIDES:
        beyond = np.roll(padded, (-y, -x), (0, 1))
        corners = np.argwhere(padded & ~beyond) - 1
        for corner, target in zip(
            (corners + start).tolist(), (corners + end).tolist(), strict=True
        ):
            targets.setdefault(tuple(corner), []).append(tuple(target))
    sides = dict.fromkeys(
        (corner, target) for corner in targets for target in targets[corner]
    )
    loops = []
    while sides:
        side, loop = next(iter(sides)), []
        while side in sides:
            del sides[side]
            loop.append(side[0])
            # Where two ways cross, turn right: stay at the same pixel.
            side = (
                side[1],
                next(
                    target
                    for target in targets[side[1]]
                    if len(targets[side[1]]) == 1 or _turns_right(*side, target)
                ),
            )
        loop = np.array(loop)
        ways = np.roll(loop, -1, 0) - loop
        loops.append(loop[(ways != np.roll(ways, 1, 0)).any(1)])
    return loops


def _turns_right(before, corner, after):
    """Whether a way does, y pointing down."""
    down, right = corner[0] - before[0], corner[1] - before[1]
    return right * (after[0] - corner[0]) > down * (after[1] - corner[1])


def _area(loop):
    """The area within a loop, positive if it is clockwise, y pointing down."""
    y, x = loop.T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
