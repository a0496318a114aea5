"""Read, validate and write COCO's JSON."""

import json
import os
from collections import Counter
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from keras_paligemma.config import parse_json
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import relative_name
from keras_paligemma.tasks.masks import from_rle
from keras_paligemma.tasks.outlines import area_of

# Keys stored in fields of `Annotation` and `Picture`, or implied by the
# position of an entry.
_OWN_FIELDS = {
    *("image_id", "category_id", "bbox", "segmentation", "iscrowd", "score"),
    *("file_name", "height", "width"),
}

# Keys that the index needs; others are read with their picture.
_NEEDED = {
    "images": {"id"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id"},
}


def _checked(path):
    """Return a file's dict; raise on entries that an index cannot use."""
    data = _read(path)
    try:
        _check_entries(path, data)
        _check_ids(path, data)
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
        data = parse_json(path.read_bytes())
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
    """Raise for an entry, counted from 0, that lacks a required key."""
    for kind, fields in _NEEDED.items():
        if not isinstance(data[kind], list):
            raise ValueError(
                f"{path} is no COCO file: '{kind}' is no list. Expected: a "
                f"list of objects. Received: {data[kind]!r:.80}."
            )
        for number, entry in enumerate(data[kind]):
            if not isinstance(entry, dict) or not fields <= entry.keys():
                raise ValueError(
                    f"{path} is no COCO file: {kind}[{number}] lacks a field. "
                    f"Expected: an object with {sorted(fields)}. Received: "
                    f"{entry!r:.80}."
                )
    for number, category in enumerate(data["categories"]):
        if not isinstance(category["name"], str):
            raise ValueError(
                f"{path} is no COCO file: categories[{number}] has a name that "
                f"is no text. Expected: a string. Received: {category!r:.80}."
            )


def _check_ids(path, data):
    """Raise on duplicate ids: annotations would belong to only one of them."""
    for kind in ("images", "categories"):
        counts = Counter(entry["id"] for entry in data[kind])
        duplicates = [id for id, count in counts.items() if count > 1]
        if duplicates:
            raise ValueError(
                f"{path}: several {kind} have the same id. Received: "
                f"{duplicates[:5]}. Expected: each id once."
            )


def _check_references(path, data):
    """Raise on annotations of missing pictures or categories."""
    for field, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in data[kind]}
        for annotation in data["annotations"]:
            id = annotation[field]
            if id in known:
                continue
            hint = ""
            if str(id) in map(str, known):
                hint = " One is there of another type: write ids as numbers."
            raise ValueError(
                f"{path}, annotation {annotation.get('id')}: its {field} is "
                f"not in the file. Received: {field}={id!r}. Expected: the id "
                f"of one of '{kind}'.{hint}"
            )


def read(path: Path, image_folder: str) -> ObjectSet:
    """Read a COCO file as a set of objects.

    Args:
        path: path of the JSON file.
        image_folder: str that `file_name` is relative to.

    Returns:
        `ObjectSet`; entries keep the keys that only COCO has, including ids.

    Raises:
        ValueError: if the file is not a COCO file; names the wrong entry.
    """
    data = _checked(path)
    names = {
        category["id"]: category["name"] for category in data["categories"]
    }
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        label = names[annotation["category_id"]]
        annotations[annotation["image_id"]].append(
            _annotation(annotation, label)
        )
    return ObjectSet(
        path,
        image_folder,
        tuple(dict.fromkeys(names.values())),
        [_picture(image, annotations[image["id"]]) for image in data["images"]],
        extra={
            name: value
            for name, value in data.items()
            if name not in ("images", "annotations")
        },
    )


def write(objects: ObjectSet, path: Path, image_folder: str) -> Counter:
    """Write a set of objects as a COCO file.

    Args:
        objects: `ObjectSet` of pictures in pixels, without problems.
        path: path of the JSON file to write.
        image_folder: str that `file_name` becomes relative to.

    Returns:
        Empty Counter: the format loses nothing.
    """
    categories = objects.extra.get("categories", ())
    if [category["name"] for category in categories] != list(objects.classes):
        categories = [
            {"id": number, "name": name}
            for number, name in enumerate(objects.classes, 1)
        ]
    numbers = {category["name"]: category["id"] for category in categories}
    rows = [
        (row, annotation)
        for row, picture in enumerate(objects.pictures)
        for annotation in picture.annotations
    ]
    image_ids = _ids([picture.extra for picture in objects.pictures])
    ids = _ids([annotation.extra for _, annotation in rows])
    images = [
        dict(picture.extra)
        | {"id": id, "file_name": relative_name(picture, objects, image_folder)}
        | dict(zip(("height", "width"), picture.known_size(), strict=True))
        for id, picture in zip(image_ids, objects.pictures, strict=True)
    ]
    annotations = [
        _entry(annotation)
        | {"id": id, "image_id": image_ids[row]}
        | {"category_id": numbers[annotation.label]}
        for id, (row, annotation) in zip(ids, rows, strict=True)
    ]
    content = dict(objects.extra) | {
        "images": images,
        "categories": categories,
        "annotations": annotations,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return Counter()


def _annotation(entry, label):
    box, problem = _edges(entry.get("bbox")), ""
    if box is None:
        problem = (
            "The box does not fit COCO's format. Expected: 'bbox', four "
            "numbers [x, y, width, height] in pixels. Received: "
            f"{entry.get('bbox')!r:.80}."
        )
    is_crowd = entry.get("iscrowd")
    if is_crowd not in (None, 0, 1):
        problem = (
            "Whether this is a crowd is not told. Expected: 'iscrowd', 0 or "
            f"1. Received: {is_crowd!r:.80}."
        )
    score = entry.get("score")
    return Annotation(
        label,
        box,
        entry.get("segmentation") or None,
        is_crowd == 1,
        float(score) if _is_number(score) else None,
        f"annotation {entry.get('id')}",
        {name: entry[name] for name in entry if name not in _OWN_FIELDS},
        problem,
    )


def _picture(entry, annotations):
    size = (entry.get("height"), entry.get("width"))
    name, problem = entry.get("file_name"), ""
    if not (
        all(_is_number(side) and side > 0 for side in size)
        and isinstance(name, str)
    ):
        wanted = ("file_name", "height", "width")
        received = {key: entry.get(key) for key in wanted}
        problem = (
            "The picture lacks its name or size. Expected: 'file_name' as "
            "text, 'height' and 'width' as numbers of pixels. Received: "
            f"{received!r:.200}."
        )
        size = None
    extra = {key: entry[key] for key in entry if key not in _OWN_FIELDS}
    return Picture(
        name or "", annotations, size, f"image {entry['id']}", extra, problem
    )


def _entry(annotation):
    """Return an annotation's COCO keys, without ids."""
    y1, x1, y2, x2 = annotation.box
    entry = dict(annotation.extra)
    entry |= {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": annotation.segmentation or [],
        "iscrowd": int(annotation.is_crowd),
    }
    entry.setdefault("area", _area(annotation))
    if annotation.score is not None:
        entry["score"] = annotation.score
    return entry


def _area(annotation):
    if not annotation.has_mask():
        y1, x1, y2, x2 = annotation.box
        return (y2 - y1) * (x2 - x1)
    if isinstance(annotation.segmentation, Mapping):
        return int(from_rle(annotation.segmentation).sum())
    loops = [
        np.reshape(outline, (-1, 2))[:, ::-1]
        for outline in annotation.segmentation
    ]
    return float(sum(abs(area_of(loop)) for loop in loops))


def _ids(extras):
    """Return the entries' ids, or new ones unless all have their own."""
    found = [extra.get("id") for extra in extras]
    if None in found or len(set(found)) < len(found):
        return list(range(1, len(extras) + 1))
    return found


def _edges(box):
    """Return (y1, x1, y2, x2) of [x, y, width, height], or `None`."""
    if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)):
        x, y, width, height = box
        return (y, x, y + height, x + width)
    return None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
