"""RefCOCO: mask and box of the object that an expression refers to."""

import re
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column
from keras_paligemma.tasks.locations import LAST
from keras_paligemma.tasks.mask_codec import BOOK
from keras_paligemma.tasks.mask_codec import CODES
from keras_paligemma.tasks.mask_codec import SIDE
from keras_paligemma.tasks.masks import from_rle

# An answer begins with a box and a mask; the rest is ignored.
_ANSWER = re.compile(r"<loc(\d{4})>" * 4 + r"<seg(\d{3})>" * CODES)
# Masks decoded at a time.
_BATCH = 64


def refcoco(
    predictions: Sequence[str],
    boxes: Sequence[Sequence[float]],
    masks: Sequence[Any],
    decode: Callable[[np.ndarray], np.ndarray],
    thresholds: Sequence[float] = (0.5, 0.75),
) -> Scores:
    """Score one box and mask per row.

    A predicted mask is resized bilinearly to its box, whose edges are truncated
    to whole pixels, and thresholded at 0. An answer that does not begin with a
    box of positive area and 16 codes scores 0.

    Args:
        predictions: list of str, "<loc…>×4<seg…>×16 …".
        boxes: list of the ground truth (y1, x1, y2, x2) per row, relative to
            the picture's size.
        masks: list per row of a bool array (height, width) of the picture's
            size, or COCO's run lengths, {"size": …, "counts": …}.
        decode: function of int codes (n, 16) to float32 masks (n, 64, 64) in
            [-1, 1], such as the decoder of `vae-oid.npz`.
        thresholds: floats, intersection over union of "boxacc".

    Returns:
        `Scores` of "miou", "boxacc/0.5" and so on, and "invalid", the fraction
        of answers without a mask (the original reports their number).

    Raises:
        ValueError: columns of different lengths, a row without such a box, or
            `decode` returned an array of another shape.

    Source: big_vision `evaluators/proj/paligemma/transfers/segmentation.py`.
    """
    check_rows(predictions, boxes=boxes, masks=masks)
    for row, box in enumerate(boxes):
        _check_box(box, row)
    parsed = [_parse(text) for text in predictions]
    decoded = _decode(parsed, decode)
    rows = {"miou": [], "invalid": []}
    rows |= {f"boxacc/{threshold}": [] for threshold in thresholds}
    for row, (found, right) in enumerate(zip(parsed, boxes, strict=True)):
        box = np.zeros(4) if found is None else np.array(found[:4])
        overlap = box_iou((box / LAST).tolist(), right)
        for threshold in thresholds:
            rows[f"boxacc/{threshold}"].append(threshold <= overlap)
        share = None
        if found is not None:
            mask = to_mask(masks[row])
            share = _mask_iou(decoded[row], box / LAST, mask)
        rows["miou"].append(share or 0.0)
        rows["invalid"].append(share is None)
    return Scores({name: column(values) for name, values in rows.items()})


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the intersection over union of two boxes.

    Args:
        first, second: floats (y1, x1, y2, x2).

    Returns:
        float, 0 to 1; nan if both areas are 0.

    Example:

    >>> float(box_iou((0, 0, 1, 1), (0, 0.5, 1, 1)))
    0.5
    """
    y1, x1 = np.maximum(first[:2], second[:2])
    y2, x2 = np.minimum(first[2:], second[2:])
    inner = _area(y1, x1, y2, x2)
    union = _area(*first) + _area(*second) - inner
    return inner / union if union else float("nan")


def _area(y1, x1, y2, x2):
    return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)


def _check_box(box, row):
    """Raise if ground truth is no box relative to the picture's size."""
    edges = np.asarray(box, "float64")
    # Annotated boxes may stick out of their picture by a hundredth.
    if not (
        edges.shape == (4,)
        and (np.abs(edges - 0.5) <= 0.51).all()
        and (edges[:2] <= edges[2:]).all()
    ):
        raise ValueError(
            f"Row {row} has no box to compare with. Expected: (y1, x1, y2, "
            "x2), shares of the picture's height and width, y1 <= y2 and x1 "
            f"<= x2. Received: {box}."
        )


def _parse(text):
    """Return 4 locations and 16 codes, or `None`."""
    found = _ANSWER.match(text)
    if found is None:
        return None
    numbers = [int(number) for number in found.groups()]
    inside = max(numbers[:4]) <= LAST and max(numbers[4:]) < BOOK
    return numbers if inside else None


def _decode(parsed, decode):
    """Decode masks in batches; return a dict of rows to masks."""
    rows = [row for row, found in enumerate(parsed) if found is not None]
    masks = {}
    for first in range(0, len(rows), _BATCH):
        batch = rows[first : first + _BATCH]
        codes = np.array([parsed[row][4:] for row in batch], "int32")
        found = np.asarray(decode(codes), "float32")
        shape = (len(batch), SIDE, SIDE)
        if found.shape[:3] != shape:
            raise ValueError(
                "`decode` returned no masks. Expected: an array of shape "
                f"{shape}. Received: {found.shape}."
            )
        masks |= zip(batch, found.reshape(shape), strict=True)
    return masks


def to_mask(mask: Any) -> np.ndarray:
    """Convert a mask, an array or COCO's run lengths, to a bool array.

    Args:
        mask: array (height, width), positive within the object; or dict of
            `counts` and `size`.

    Returns:
        bool array (height, width).

    Raises:
        ValueError: it is neither, such as COCO's polygons.
    """
    if isinstance(mask, dict):
        return from_rle(mask)
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        return mask > 0
    given = getattr(mask, "shape", None) or type(mask).__name__
    raise ValueError(
        "A mask is an array of the picture's size or COCO's run lengths. "
        f"Expected: an array (height, width), or a dict. Received: {given}. "
        "`from_polygons` draws COCO's polygons."
    )


def _mask_iou(decoded, box, mask):
    """Return the IoU of a pasted mask; `None` if its box is below a pixel."""
    height, width = mask.shape
    y1, x1 = int(box[0] * height), int(box[1] * width)
    y2, x2 = int(box[2] * height), int(box[3] * width)
    if x2 <= x1 or y2 <= y1:
        return None
    resized = Image.fromarray(decoded).resize(
        (x2 - x1, y2 - y1), Image.Resampling.BILINEAR
    )
    pasted = np.asarray(resized) > 0.0
    inner = (mask[y1:y2, x1:x2] & pasted).sum()
    return float(inner / (mask.sum() + pasted.sum() - inner))
