"""Read and write YOLO's text files: a file per picture, a line per object."""

import math
import os
from collections import Counter
from pathlib import Path

from keras_paligemma.data.object_set import UNKNOWN
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import bounds_of
from keras_paligemma.data.object_set import has_fields
from keras_paligemma.data.object_set import lines_of
from keras_paligemma.data.object_set import picture_files
from keras_paligemma.data.object_set import plain_name
from keras_paligemma.data.object_set import polygons_of

# Significant digits: finer than a pixel, coarser than rounding errors.
_DIGITS = 10

_EXPECTED = (
    "Expected: class x y width height, or class x1 y1 x2 y2 x3 y3 …, as shares "
    "of the picture; a confidence may follow."
)


def read(
    path: Path, image_folder: str | None = None, split: str = "train"
) -> ObjectSet:
    """Read boxes or polygons in YOLO's text files as a set of objects.

    Label files are beside their pictures, or in the same path with `labels` in
    place of `images`. A picture without a label file has no objects.

    Args:
        path: path of `data.yaml`, or of a folder that contains it or
            `classes.txt`, one name per line, as CVAT and Label Studio write.
        image_folder: str, folder of pictures; that of the split if `None`.
        split: str, key of the YAML for the pictures: "train", "val" or "test".

    Returns:
        `ObjectSet` of pictures without sizes: the text files have none.

    Raises:
        ValueError: if there are no class names, or no such split.
        ImportError: if PyYAML is not installed.
    """
    home, classes, entries = _head(path, split)
    if image_folder is not None:
        entries = [Path(image_folder)]
    files = sorted(
        {file for entry in entries for file in _pictures_of(entry, home)}
    )
    labels = [_labels_of(file) for file in files]
    pictures = [
        _read_picture(file, label, home, classes)
        for file, label in zip(files, labels, strict=True)
    ]
    known = set(labels)
    strays = {
        file
        for folder in {label.parent for label in labels}
        for file in folder.glob("*.txt")
        if file not in known and file.name not in _NO_LABELS
    }
    skipped = Counter({"labels of missing pictures": len(strays)})
    return ObjectSet(path, os.fspath(home), classes, pictures, +skipped)


def write(objects: ObjectSet, folder: Path, masks: bool) -> Counter:
    """Write a set of objects as YOLO's text files, without its pictures.

    Args:
        objects: `ObjectSet` of pictures in pixels, without problems.
        folder: path of an empty folder, which gets `data.yaml` and `labels`.
            Pictures belong into `images`.
        masks: bool, whether to write polygons instead of boxes.

    Returns:
        Counter of what the format cannot hold.

    Raises:
        ImportError: if PyYAML is not installed.
    """
    lost = Counter()
    numbers = {name: number for number, name in enumerate(objects.classes)}
    for picture in objects.pictures:
        name = Path("labels", plain_name(picture)).with_suffix(".txt")
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for annotation in picture.annotations:
            values = _values(annotation, picture.size, masks, lost)
            if values is None:
                continue
            if annotation.score is not None:
                values = [*values, annotation.score]
            texts = [f"{value:.{_DIGITS}g}" for value in values]
            number = str(numbers[annotation.label])
            lines.append(" ".join([number, *texts]) + "\n")
            lost["marks of crowds"] += annotation.is_crowd
            lost["fields of other formats"] += has_fields(annotation.extra)
        file.write_text("".join(lines), encoding="utf-8")
        lost["fields of other formats"] += has_fields(picture.extra)
    head = {
        "path": ".",
        "train": "images",
        "val": "images",
        "names": dict(enumerate(objects.classes)),
    }
    text = _yaml().safe_dump(head, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return +lost


_NO_LABELS = {"classes.txt", "train.txt", "val.txt", "test.txt", "notes.txt"}


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "YOLO's data.yaml needs PyYAML. Install it with `pip install "
            "'keras_paligemma[data]'`."
        ) from error
    return yaml


def _head(path, split):
    """Return the folder, class names, and entries of a split."""
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        found = [folder / name for name in ("data.yaml", "classes.txt")]
        file = next((name for name in found if name.is_file()), found[0])
    if not file.is_file():
        raise ValueError(
            "YOLO's classes are not told. Expected: data.yaml with `names`, or "
            f"classes.txt. Received: neither in {folder}."
        )
    if file.suffix == ".txt":
        images = folder / "images"
        entries = [images if images.is_dir() else folder]
        return folder, tuple(lines_of(file)), entries
    yaml = _yaml()
    try:
        # Values stay text: a class may be called no, which is False in YAML.
        head = yaml.load(file.read_text("utf-8-sig"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}.") from error
    names = head.get("names") if isinstance(head, dict) else None
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if sorted(names) == sorted(numbers):
            names = [names[number] for number in numbers]
    if not isinstance(names, list):
        raise ValueError(
            f"{file} has no names of classes. Expected: `names`, a list, or a "
            f"dictionary of 0, 1, …. Received: {names!r:.80}."
        )
    home = folder / str(head.get("path") or ".")
    # An absolute path may be that of the machine that wrote the file.
    home = home if home.is_dir() else folder
    entries = head.get(split)
    if not entries:
        raise ValueError(
            f"{file} has no split of this name. Expected: one of "
            f"{[key for key in ('train', 'val', 'test') if head.get(key)]}. "
            f"Received: {split!r}."
        )
    entries = entries if isinstance(entries, list) else [entries]
    entries = [_entry(home, str(entry)) for entry in entries]
    return home, tuple(str(name) for name in names), entries


def _entry(home, entry):
    """Return the folder or list of a split; Roboflow has a surplus "../"."""
    places = [home / entry, home / entry.removeprefix("../")]
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        "The pictures of a split are not there. Expected: a folder, or a text "
        f"file of paths. Received: {entry!r} in {home}."
    )


def _pictures_of(entry, home):
    if entry.is_dir():
        return picture_files(entry)
    return [home / line for line in lines_of(entry)]


def _labels_of(file):
    """Return the label file of a picture: in `labels` in place of `images`."""
    parts = list(file.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    moved, beside = Path(*parts).with_suffix(".txt"), file.with_suffix(".txt")
    return beside if beside.is_file() and not moved.is_file() else moved


def _read_picture(file, label, home, classes):
    name, place = (os.path.relpath(path, home) for path in (file, label))
    if not (label.is_file() or file.is_file()):
        problem = (
            "There is neither a picture nor its labels. Expected: files at "
            f"the listed path. Received: {name}, {place} in {home}."
        )
        return Picture(name, UNKNOWN, place=place, problem=problem)
    try:
        text = label.read_text("utf-8-sig") if label.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        problem = f"The labels cannot be read. Received: {error}."
        return Picture(name, UNKNOWN, place=place, problem=problem)
    annotations = tuple(
        _annotation(line.split(), f"line {number}", classes)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    )
    return Picture(name, annotations, place=place)


def _annotation(words, place, classes):
    try:
        number, *values = [float(word) for word in words]
        if not all(map(math.isfinite, values)):
            raise ValueError
    except ValueError:
        return _wrong(place, f"These are no numbers. {_EXPECTED}", words)
    if not (number.is_integer() and 0 <= number < len(classes)):
        message = (
            "The class is not in the data set. Expected: 0 to "
            f"{len(classes) - 1}."
        )
        return _wrong(place, message, words)
    label = classes[int(number)]
    score = None
    if len(values) == 5 or (len(values) >= 7 and len(values) % 2):
        *values, score = values
    if len(values) == 4:
        x, y, width, height = values
        y1, x1 = y - height / 2, x - width / 2
        box = (y1, x1, y1 + height, x1 + width)
        return Annotation(label, box, None, False, score, place)
    if len(values) < 6:
        message = f"These are {len(values)} numbers. {_EXPECTED}"
        return _wrong(place, message, words)
    polygons = [values]
    return Annotation(label, bounds_of(polygons), polygons, False, score, place)


def _wrong(place, message, words):
    received = " ".join(words)
    problem = f"{message} Received: {received!r:.80}."
    return Annotation("", None, place=place, problem=problem)


def _values(annotation, size, masks, lost):
    """Return the numbers of a line; `None` if a mask is missing."""
    height, width = size
    if not masks:
        lost["masks"] += annotation.has_mask()
        y1, x1, y2, x2 = annotation.box
        centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
        return [*centre, (x2 - x1) / width, (y2 - y1) / height]
    if not annotation.has_mask():
        lost["objects without a mask"] += 1
        return None
    polygons = polygons_of(annotation, size)
    lost["masks in parts, which a line of no width joins"] += len(polygons) > 1
    bounds = bounds_of(polygons)
    apart = max(abs(a - b) for a, b in zip(bounds, annotation.box, strict=True))
    lost["boxes other than those around their masks"] += apart > 0.5
    sides = (width, height)
    return [edge / sides[i % 2] for i, edge in enumerate(_joined(polygons))]


def _joined(polygons):
    """Join polygons to one, by lines from the first to each other and back."""
    first, *others = polygons
    joined = list(first)
    for other in others:
        joined += [*first[:2], *other, *other[:2]]
    return joined + list(first[:2]) if others else joined
