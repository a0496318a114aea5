"""Boxes: COCO's mean average precision; precision, recall and F1."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.referring import box_iou
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import column

# Names of the values in `COCOeval.stats`, in order.
_STATS = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)


def mean_average_precision(
    predictions: Sequence[Sequence[tuple[Any, ...]]],
    right: Sequence[Sequence[tuple[Any, ...]]],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[str, float]:
    """Compute COCO's box metrics with pycocotools.

    Args:
        predictions: list per picture of (box, label, score), or of objects
            with these attributes. A box is (y1, x1, y2, x2), relative to the
            picture's size.
        right: list per picture of ground truth (box, label), (box, label,
            is_crowd), or objects.
        sizes: list of (height, width) in pixels, which decide whether an
            object is small, medium or large; `None` takes 1,000 by 1,000.

    Returns:
        dict of "map" (averaged over IoU .5 to .95), "map_50", "map_75",
        "map_small" and so on; -1 if there is no such object, as in COCO.
        These are not means over pictures, so they have no interval.

    Raises:
        ValueError: lists of different lengths, a prediction without a score,
            a score or an edge that is no number, or a box upside down.

    Example:

    >>> box = (0.1, 0.1, 0.5, 0.5)
    >>> found = [[(box, "cat", 0.9)]]
    >>> round(mean_average_precision(found, [[(box, "cat")]])["map"], 6)
    1.0

    Source: https://cocodataset.org/#detection-eval.
    """
    _check_pictures(predictions, right, sizes)
    coco_format = needed("pycocotools.coco", "Mean average precision", "eval")
    evaluation = needed("pycocotools.cocoeval", "Mean average precision")
    if sizes is None:
        sizes = [(1000, 1000)] * len(right)
    # COCO's category ids, from 1, in order of first appearance.
    labels = {}
    right = [
        [_parts(box)[:2] if hasattr(box, "box") else box for box in boxes]
        for boxes in right
    ]
    predictions = [[_parts(box) for box in boxes] for boxes in predictions]
    for picture in (*right, *predictions):
        for box in picture:
            labels.setdefault(box[1], len(labels) + 1)
    truths, found = [], []
    for image, (objects, size) in enumerate(zip(right, sizes, strict=True), 1):
        for box, label, *crowd in objects:
            x, y, width, height = bbox = _xywh(box, size)
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image,
                    "category_id": labels[label],
                    "bbox": bbox,
                    "area": width * height,
                    "iscrowd": int(bool(crowd and crowd[0])),
                }
            )
    for image, (objects, size) in enumerate(
        zip(predictions, sizes, strict=True), 1
    ):
        for box, label, *more in objects:
            score = more[0] if more else None
            if score is None or not np.isfinite(score):
                raise ValueError(
                    "A score orders the objects. Expected: a number. "
                    f"Received: {score!r} of {label!r} in picture {image - 1}."
                )
            bbox = _xywh(box, size)
            found.append([image, *bbox, float(score), labels[label]])
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco_format.COCO()
        data.dataset = {
            "info": {},
            "images": [{"id": n + 1} for n in range(len(right))],
            "categories": [
                {"id": i, "name": str(n)} for n, i in labels.items()
            ],
            "annotations": truths,
        }
        data.createIndex()
        # pycocotools cannot read an empty list, so a box of an unknown
        # category is added, which is not evaluated.
        found.append([1, *[0] * 6])
        results = data.loadRes(np.array(found, "float64"))
        result = evaluation.COCOeval(data, results, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return dict(zip(_STATS, map(float, result.stats), strict=True))


def box_f1(
    predictions: Sequence[Sequence[tuple[Any, ...]]],
    right: Sequence[Sequence[tuple[Any, ...]]],
    threshold: float = 0.5,
) -> Scores:
    """Compute precision, recall and F1 of boxes with labels.

    Args:
        predictions: list per picture of (box, label, …), or of objects, most
            confident first: each is matched with the best ground truth box
            of its label that is still unmatched.
        right: list per picture of ground truth, likewise.
        threshold: float, smallest intersection over union of a match.

    Returns:
        `Scores` of "precision", "recall", "f1" and "iou", the mean over
        matches; nan where the denominator is 0.

    Raises:
        ValueError: lists of different lengths.

    Example:

    >>> box = (0.1, 0.1, 0.5, 0.5)
    >>> box_f1([[(box, "cat"), (box, "cat")]], [[(box, "cat")]]).values()["f1"]
    0.6666666666666666
    """
    _check_pictures(predictions, right, None)
    met, overlaps = [], []
    for found, wanted in zip(predictions, right, strict=True):
        shares = match_boxes(found, wanted, threshold)
        met.append(len(shares))
        overlaps.append(sum(shares))
    return quotients(
        column(met),
        column([len(boxes) for boxes in predictions]),
        column([len(boxes) for boxes in right]),
        column(overlaps),
    )


def match_boxes(
    predictions: Sequence[tuple[Any, ...]],
    right: Sequence[tuple[Any, ...]],
    threshold: float,
) -> list[float]:
    """Match boxes of one picture greedily; return the IoU of each match."""
    left, shares = [_parts(box) for box in right], []
    for box, label, *_ in map(_parts, predictions):
        overlaps = [
            box_iou(box, other) if other_label == label else -1.0
            for other, other_label, *_ in left
        ]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] >= threshold:
            shares.append(float(overlaps[best]))
            del left[best]
    return shares


def quotients(met, predicted, right, overlaps=None):
    """Return precision, recall and F1 over all rows, from counts per row.

    Args:
        met, predicted, right: float64 arrays (rows,), numbers of matches,
            predictions and ground truth boxes.
        overlaps: float64 array (rows,), sum of the matches' IoU, or `None`.

    Returns:
        `Scores`; the quality of a row is its own F1.
    """
    columns = {"met": met, "predicted": predicted, "right": right}
    if overlaps is not None:
        columns["overlaps"] = overlaps

    both = predicted + right
    quality = np.where(both > 0, 2 * met / np.maximum(both, 1), 1.0)
    return Scores(columns, _divided, quality)


def _divided(means, count):
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.add(means["predicted"], means["right"])
        values = {
            "precision": np.divide(means["met"], means["predicted"]),
            "recall": np.divide(means["met"], means["right"]),
            "f1": np.divide(2 * means["met"], both),
        }
        if "overlaps" in means:
            values["iou"] = np.divide(means["overlaps"], means["met"])
    return values


def _parts(item):
    """Return box, label and score of an object; a tuple unchanged."""
    return (item.box, item.label, item.score) if hasattr(item, "box") else item


def _xywh(box, size):
    # pycocotools takes an overlap of NaN for a match, and ignores objects of
    # negative area.
    edges = np.asarray(box, "float64")
    if not (
        edges.shape == (4,)
        and np.isfinite(edges).all()
        and (edges[:2] <= edges[2:]).all()
    ):
        raise ValueError(
            "A box has four finite edges. Expected: (y1, x1, y2, x2), relative "
            f"to the picture's size, y1 <= y2 and x1 <= x2. Received: {box}."
        )
    y1, x1, y2, x2 = (
        float(edge) * side
        for edge, side in zip(box, (*size, *size), strict=True)
    )
    return [x1, y1, x2 - x1, y2 - y1]


def _check_pictures(predictions, right, sizes):
    lengths = {len(predictions), len(right)}
    lengths |= {len(sizes)} if sizes is not None else set()
    if len(lengths) != 1 or not len(right):
        raise ValueError(
            "Boxes are compared picture by picture. Expected: one or more "
            f"lists each of one length. Received: {len(predictions)} of "
            f"predictions, {len(right)} of right ones"
            f"{'' if sizes is None else f', {len(sizes)} sizes'}."
        )
