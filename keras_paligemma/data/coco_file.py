"""COCO's JSON, checked before anything is made of it, and its fields."""

import collections
import json
import os
from pathlib import Path

import numpy as np

# What the index is made of; the rest is asked for with its picture.
_NEEDED = {
    "images": {"id"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id"},
}


def read_coco(path: Path) -> dict:
    """Read a COCO file whose entries have what an index of them needs.

    Args:
        path: path of the JSON file.

    Returns:
        dict of lists `images`, `categories` and `annotations`. Each id is
        there once, and annotations name ids that are there.

    Raises:
        ValueError: the file is no COCO file; with the entry that is wrong.
    """
    data = _read(path)
    try:
        _check_entries(path, data)
        _refuse_twins(path, data)
        _check_references(path, data)
    except TypeError as error:  # Lists or dictionaries as ids.
        raise ValueError(
            f"{path} is no COCO file: a field is of another type. Expected: "
            f"numbers as ids, and strings as names. Received: {error!r}."
        ) from error
    return data


def _read(path):
    if not path.is_file():
        raise ValueError(
            "The data file does not exist. Expected: path of a COCO JSON "
            f"file. Received: {os.fspath(path)!r}."
        )
    wanted = {"images", "annotations", "categories"}
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or not wanted <= set(data):
        received = sorted(data) if isinstance(data, dict) else type(data)
        raise ValueError(
            f"{path} is no COCO file. Expected: an object with "
            f"{sorted(wanted)}. Received: {received}."
        )
    return data


def _check_entries(path, data):
    """Name the entry, counted from 0, that lacks what the index needs."""
    for kind, fields in _NEEDED.items():
        if not isinstance(data[kind], list):
            raise ValueError(
                f"{path} is no COCO file: '{kind}' is no list. Expected: a "
                f"list of objects. Received: {data[kind]!r:.80}."
            )
        for number, one in enumerate(data[kind]):
            if not isinstance(one, dict) or not fields <= one.keys():
                raise ValueError(
                    f"{path} is no COCO file: {kind}[{number}] lacks a field. "
                    f"Expected: an object with {sorted(fields)}. Received: "
                    f"{one!r:.80}."
                )
    for number, one in enumerate(data["categories"]):
        if not isinstance(one["name"], str):
            raise ValueError(
                f"{path} is no COCO file: categories[{number}] has a name that "
                f"is no text. Expected: a string. Received: {one!r:.80}."
            )


def _refuse_twins(path, data):
    """Refuse an id that two have: annotations would go to one of them."""
    for kind in ("images", "categories"):
        counts = collections.Counter(one["id"] for one in data[kind])
        twins = [id for id, count in counts.items() if count > 1]
        if twins:
            raise ValueError(
                f"{path}: several {kind} have the same id. Received: "
                f"{twins[:5]}. Expected: each id once."
            )


def _check_references(path, data):
    """Refuse annotations of pictures or categories that are not there."""
    for field, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {one["id"] for one in data[kind]}
        for one in data["annotations"]:
            id = one[field]
            if id in known:
                continue
            hint = ""
            if str(id) in map(str, known):
                hint = " One is there of another type: write ids as numbers."
            raise ValueError(
                f"{path}, annotation {one.get('id')}: its {field} is not in "
                f"the file. Received: {field}={id!r}. Expected: the id of one "
                f"of '{kind}'.{hint}"
            )


def size_of(image):
    """Height and width of an entry; nan, nan where they are no pixels."""
    size = (image.get("height"), image.get("width"))
    if all(_is_number(side) and side > 0 for side in size):
        return size
    return (np.nan, np.nan)


def edges_of(box):
    """(y1, x1, y2, x2) of [x, y, width, height]; nan where it is none."""
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
        x, y, width, height = box
        return (y, x, y + height, x + width)
    return (np.nan,) * 4


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def clip_boxes(boxes, sizes, limit):
    """Clip boxes that stick out of their pictures, up to a limit.

    Args:
        boxes: float array (N, 4) of (y1, x1, y2, x2), pixels.
        sizes: float array (N, 2) of (height, width).
        limit: how far they may stick out, as a multiple of what is forgiven.

    Returns:
        The boxes; how far each stuck out, such a multiple, infinite where
        nothing of it is inside; and a bool array of which were clipped.
    """
    sides = np.concatenate([sizes, sizes], axis=1)
    inside = np.clip(boxes, 0, sides)
    # A pixel, and 1 % of the side where that is more.
    overhang = np.abs(boxes - inside) / np.maximum(1, 0.01 * sides)
    overhang = overhang.max(axis=1, initial=0)
    # Rounding of the sums alone does not count.
    overhang[overhang < 1e-6] = 0
    emptied = (inside[:, :2] >= inside[:, 2:]).any(axis=1)
    overhang[emptied & (overhang > 0)] = np.inf
    cut = (overhang > 0) & (overhang <= limit) & np.isfinite(overhang)
    return np.where(cut[:, None], inside, boxes), overhang, cut


def has_mask(annotation):
    """Whether there are polygons or run lengths."""
    mask = annotation.get("segmentation")
    return bool(mask.get("counts") if isinstance(mask, dict) else mask)
