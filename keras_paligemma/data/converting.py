"""Convert data sets of objects between formats, and report losses."""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_paligemma import atomic
from keras_paligemma.data import coco_file
from keras_paligemma.data import object_lines
from keras_paligemma.data import voc
from keras_paligemma.data import yolo
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import check_size
from keras_paligemma.data.object_set import in_pixels
from keras_paligemma.data.object_set import object_of
from keras_paligemma.data.object_set import plain_name
from keras_paligemma.data.object_source import box_array
from keras_paligemma.data.object_source import clip_boxes
from keras_paligemma.data.opening import open_objects
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.masks import check_segmentation
from keras_paligemma.types import PathLike

# For formats that are folders: the file they are recognised by, and the
# folder of their pictures.
_FOLDERS = {
    "yolo": ("data.yaml", "images"),
    "voc": (voc.LABEL_MAP, "JPEGImages"),
}
FORMATS = ("coco", "jsonl", *_FOLDERS)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        path: path of the file or folder that was written.
        pictures: int, number of pictures written.
        objects: int, number of objects passed to the format.
        skipped: str per invalid picture or object that was left out, with its
            place and the reason.
        lost: dict from a description of what the format cannot hold to its
            count.
    """

    path: Path
    pictures: int
    objects: int
    skipped: Sequence[str] = ()
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)


def convert(
    source: PathLike,
    target: PathLike,
    to: str,
    image_folder: PathLike | None = None,
    split: str = "train",
    task: str | None = None,
    codec: MaskCodec | None = None,
) -> Conversion:
    """Write a data set of objects in another format.

    COCO and JSONL are one file that refers to the pictures where they are;
    YOLO and VOC are folders that also get the pictures, as hard links where
    the file system supports them.

    Args:
        source: str or path, as `open_source` takes it.
        target: str or path of a new file, or of a new or empty folder.
        to: "coco", "yolo", "voc" or "jsonl".
        image_folder: str or path of the source's pictures; found if `None`.
        split: str, which split of the source to convert.
        task: "detect" writes boxes, "segment" masks, for formats that hold
            only one of them: YOLO and JSONL. `None` writes masks if all
            objects have one.
        codec: `MaskCodec` of JSONL's masks; the embedded one if `None`.

    Returns:
        `Conversion`, which lists what was left out and what is lost.

    Raises:
        ValueError: if the source's format is not recognised, `to` is unknown,
            the target exists, or the format cannot hold a name.
        ImportError: if a package that the format needs is not installed.

    Example:

    ```python
    convert("instances.json", "yolo_folder", "yolo", task="segment").lost
    # {"marks of crowds": 3}
    ```
    """
    if to not in FORMATS or task not in (None, "detect", "segment"):
        raise ValueError(
            f"There is no such format. Expected: one of {FORMATS}, task "
            f"'detect', 'segment' or None. Received: {to!r}, task={task!r}."
        )
    target = atomic.local(target)
    atomic.refuse_in_use(target)
    if to not in _FOLDERS and (target.is_dir() or not target.suffix):
        raise ValueError(
            f"{to} is one file. Expected: a path such as objects.json or "
            f"train.jsonl. Received: {os.fspath(target)!r}."
        )
    objects = open_objects(source, image_folder, split, codec)
    lost = Counter(objects.skipped)
    objects, skipped, clipped = usable(objects)
    lost["boxes clipped"] += clipped
    annotations = [
        annotation
        for picture in objects.pictures
        for annotation in picture.annotations
    ]
    if task is None:
        has_masks = annotations and all(
            annotation.has_mask() for annotation in annotations
        )
        task = "segment" if has_masks else "detect"
    try:
        if to in _FOLDERS:
            lost += _write_folder(objects, target, to, task)
        else:
            lost += _write_file(objects, target, to, task, codec)
    except UnicodeEncodeError as error:
        around = error.object[max(error.start - 40, 0) : error.end + 40]
        raise ValueError(
            f"{to} cannot hold half of a character, a lone surrogate. "
            "Expected: Unicode text as names of classes and pictures. "
            f"Received: {error.object[error.start]!r} in {around!r}. Rename "
            f"them in {os.fspath(source)}."
        ) from error
    return Conversion(
        target,
        pictures=len(objects.pictures),
        objects=len(annotations),
        skipped=tuple(skipped),
        lost=dict(+lost),
    )


def usable(objects: ObjectSet) -> tuple[ObjectSet, list[str], int]:
    """Return a set in pixels without invalid entries.

    Args:
        objects: `ObjectSet`.

    Returns:
        `ObjectSet` whose annotations have boxes within their pictures and,
        where there are any, readable masks; list of str of what was left out,
        with its place; and the number of boxes that were clipped by up to one
        pixel or 1 % of the side.
    """
    pictures, skipped, clipped = [], [], 0
    for row, picture in enumerate(objects.pictures):
        place = objects.where(row)
        try:
            picture, cut = _clipped(picture, objects.image_folder)
        except ValueError as error:
            skipped.append(f"{place}: {error}")
            continue
        clipped += cut
        kept = []
        for annotation in picture.annotations:
            try:
                _check(annotation, picture.known_size())
            except ValueError as error:
                skipped.append(f"{place}: {annotation.place}: {error}")
            else:
                kept.append(annotation)
        pictures.append(dataclasses.replace(picture, annotations=tuple(kept)))
    return dataclasses.replace(objects, pictures=pictures), skipped, clipped


def _clipped(picture, folder):
    """Return a picture in pixels with clipped boxes, and their number."""
    if picture.problem:
        raise ValueError(picture.problem)
    picture = in_pixels(picture, folder)
    size = picture.known_size()
    check_size(picture_path(picture.name, folder), size)
    annotations = list(picture.annotations)
    boxes, _, cut = clip_boxes(
        box_array(annotations),
        np.full((len(annotations), 2), size, "float64"),
        np.ones(len(annotations)),
        1,
    )
    for number in np.flatnonzero(cut):
        annotations[number] = dataclasses.replace(
            annotations[number], box=tuple(boxes[number].tolist())
        )
    picture = dataclasses.replace(picture, annotations=annotations)
    return picture, int(cut.sum())


def _check(annotation, size):
    """Raise on an annotation without a box, or with an unreadable mask."""
    object_of(annotation, size, with_mask=False)
    if annotation.has_mask():
        check_segmentation(annotation.segmentation, size)


def _write_file(objects, target, to, task, codec):
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = os.fspath(target.parent)
    with atomic.whole_file(target) as draft:
        if to == "coco":
            return coco_file.write(objects, draft, folder)
        return object_lines.write(objects, draft, folder, task, codec)


def _write_folder(objects, target, to, task):
    entry, images = _FOLDERS[to]
    _check_names(objects)
    with atomic.whole_folder(target, entry) as draft:
        if to == "yolo":
            lost = yolo.write(objects, draft, task == "segment")
        else:
            lost = voc.write(objects, draft)
        for picture in objects.pictures:
            path = picture_path(picture.name, objects.image_folder)
            place = draft / images / plain_name(picture)
            place.parent.mkdir(parents=True, exist_ok=True)
            lost["pictures that are missing"] += not _link(path, place)
    return lost


def _link(path, place):
    """Link or copy a picture; return whether that was possible."""
    if not os.path.isfile(path):
        return False
    try:
        # Of a symbolic link, the file: its own target may be relative.
        os.link(os.path.realpath(path), place)
    except OSError:  # Another file system, or one without links.
        shutil.copy(path, place)
    return True


def _check_names(objects):
    """Raise on pictures whose label files would have the same name."""
    stems = {}
    for picture in objects.pictures:
        stem = Path(plain_name(picture)).with_suffix("")
        if stem in stems:
            raise ValueError(
                "Two pictures would have one file of labels. Received: "
                f"{stems[stem]!r} and {picture.name!r}. Rename one of them."
            )
        stems[stem] = picture.name
