"""Data sets of objects in pictures, independent of their file format."""

import collections
import dataclasses
import os
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from pathlib import PurePosixPath
from typing import Any

from PIL import Image
from PIL.ExifTags import Base

from keras_paligemma.preprocessing.images import is_uri
from keras_paligemma.preprocessing.images import openable
from keras_paligemma.preprocessing.images import orientation
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.tasks.masks import from_rle
from keras_paligemma.tasks.masks import from_segmentation
from keras_paligemma.tasks.masks import to_polygons
from keras_paligemma.tasks.objects import Object
from keras_paligemma.types import PathLike

# EXIF orientations that swap height and width.
_TURNED = (5, 6, 7, 8)

# Suffixes of picture files.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".mpo"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Annotation:
    """An object as a file describes it, with coordinates not yet checked.

    Coordinates are in the unit of its `Picture`.

    Args:
        label: str, the name of its class.
        box: (y1, x1, y2, x2); `None` if the file has no valid box, in which
            case `problem` has the reason.
        segmentation: COCO's polygons, a list, or run lengths, a dict; `None`
            if there is no mask.
        is_crowd: bool, whether it represents a group of objects.
        score: float or `None`.
        place: str, its place in the picture's file, such as "annotation 7".
        extra: dict of fields that only its format has, ready for JSON.
        problem: str, why it cannot be used; "" if it can.
    """

    label: str
    box: tuple[float, float, float, float] | None
    segmentation: Sequence | Mapping | None = None
    is_crowd: bool = False
    score: float | None = None
    place: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def has_mask(self) -> bool:
        """Return whether there are polygons or run lengths."""
        mask = self.segmentation
        return bool(mask.get("counts") if isinstance(mask, Mapping) else mask)


# The objects of a picture whose own file of labels cannot be read. Without
# them it would be a picture without objects, which training leaves out.
UNKNOWN = (Annotation("", None, problem="The objects cannot be read."),)


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a file describes it, with its objects.

    Args:
        name: str, path relative to the folder of pictures, or a URI.
        annotations: `Annotation`s, in the order of the file.
        size: (height, width) in pixels, the unit of the annotations. `None` if
            the file does not contain the size: coordinates are then fractions
            of the picture's sides, and polygons flat lists of fractions.
        place: str, its place in the data set, such as "image 7" or
            "labels/a.txt".
        extra: dict of fields that only its format has, ready for JSON.
        problem: str, why it cannot be used; "" if it can.
    """

    name: str
    annotations: Sequence[Annotation] = ()
    size: tuple[float, float] | None = None
    place: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""

    def known_size(self) -> tuple[float, float]:
        """Return the size of a picture with annotations in pixels.

        Raises:
            ValueError: if they are fractions, see `in_pixels`.
        """
        if self.size is None:
            raise ValueError(
                f"The annotations of {self.name!r} are shares of its sides. "
                "Expected: pixels, as `in_pixels` gives them."
            )
        return self.size


@dataclasses.dataclass(frozen=True)
class ObjectSet:
    """A data set of objects in pictures, of any format.

    Args:
        path: path of the file or folder that it was read from.
        image_folder: str, folder that names of pictures are relative to.
        classes: names of all classes, in the order of the data set, including
            those without objects.
        pictures: `Picture`s.
        skipped: dict from a description of what was left out to its count.
        extra: dict of fields that only its format has, ready for JSON.
    """

    path: Path
    image_folder: str
    classes: Sequence[str]
    pictures: Sequence[Picture]
    skipped: Mapping[str, int] = dataclasses.field(
        default_factory=collections.Counter
    )
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def where(self, row: int) -> str:
        """Return the place of a picture: data set and entry."""
        return f"{os.fspath(self.path)}, {self.pictures[row].place}"


def in_pixels(picture: Picture, folder: str) -> Picture:
    """Return a picture whose annotations are in pixels.

    Args:
        picture: `Picture`; one with a size is returned unchanged.
        folder: str, folder of the pictures. The size is read from the file.

    Raises:
        ValueError: if the file cannot be read.
    """
    if picture.size is not None:
        return picture
    height, width = size_of_file(picture_path(picture.name, folder))
    scaled = []
    for annotation in picture.annotations:
        box, polygons = annotation.box, annotation.segmentation
        if box is not None:
            y1, x1, y2, x2 = box
            box = (y1 * height, x1 * width, y2 * height, x2 * width)
        if polygons is not None:
            sides = (width, height)
            polygons = [
                [edge * sides[i % 2] for i, edge in enumerate(polygon)]
                for polygon in polygons
            ]
        scaled.append(
            dataclasses.replace(annotation, box=box, segmentation=polygons)
        )
    return dataclasses.replace(
        picture, annotations=scaled, size=(height, width)
    )


def size_of_file(path: PathLike) -> tuple[int, int]:
    """Return (height, width) of a picture, rotated by its EXIF orientation.

    Args:
        path: str or path, or a URI as `picture_path` returns it.

    Raises:
        ValueError: if the picture is missing or damaged.
    """
    (height, width), is_turned = opened_size(path)
    return (width, height) if is_turned else (height, width)


def opened_size(path: PathLike) -> tuple[tuple[int, int], bool]:
    """Return (height, width) as stored, and whether EXIF swaps them."""
    try:
        with Image.open(openable(path)) as opened:
            width, height = opened.size
            is_turned = orientation(opened) in _TURNED
            # Of a turned TIFF, new versions of Pillow swap the sides when they
            # open it, old ones when they decode it. Its tags are as stored.
            tags = getattr(opened, "tag_v2", {})
            width = tags.get(Base.ImageWidth, width)
            height = tags.get(Base.ImageLength, height)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's have no common base class.
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The picture cannot be read. Received: {str(path):.300} "
            f"({reason})."
        ) from error
    return (height, width), is_turned


def check_size(path: str, size: tuple[float, float]):
    """Raise if a picture's shape differs from that of its annotations.

    The file may be rotated, or a different picture. A resized copy is accepted:
    boxes become fractions of the sides.

    Args:
        path: str, path of the picture; one that cannot be read raises later,
            when it is decoded.
        size: (height, width) that the annotations refer to, pixels.

    Raises:
        ValueError: if the aspect ratios differ.
    """
    try:
        stored, is_turned = opened_size(path)
    except ValueError:
        return
    found = stored[::-1] if is_turned else stored
    if abs(found[0] * size[1] - found[1] * size[0]) > sum(size):
        raise ValueError(
            "The picture is not of the size that its boxes were drawn on. "
            f"Expected: (height, width) {size}, or the same shape. Received: "
            f"{found}{', turned as its EXIF says' if is_turned else ''}, "
            f"{path:.300}."
        )


def object_of(
    annotation: Annotation,
    size: tuple[float, float],
    box: Sequence[float] | None = None,
    with_mask: bool = True,
) -> Object:
    """Convert an annotation in pixels to an object.

    Args:
        annotation: `Annotation`.
        size: (height, width) of the picture, pixels.
        box: (y1, x1, y2, x2) that replaces the annotation's, for example a
            clipped one.
        with_mask: bool, whether the object must have a mask.

    Returns:
        `Object` with the label and score of the annotation, the label without
        blanks around it.

    Raises:
        ValueError: if the annotation has a problem, its box is outside the
            picture, or its mask is missing, damaged, or empty inside the box.
        ImportError: if pycocotools is not installed.
    """
    if annotation.problem:
        raise ValueError(annotation.problem)
    box = annotation.box if box is None else box
    if box is None:
        raise ValueError(
            "There is no box. Expected: (y1, x1, y2, x2). Received: None."
        )
    y1, x1, y2, x2 = map(float, box)
    # Answers have no blanks around their labels.
    fields = {"label": annotation.label.strip(), "score": annotation.score}
    try:
        found = Object.from_xyxy((x1, y1, x2, y2), size, **fields)
    except ValueError as error:
        raise ValueError(
            f"The box does not fit its picture of (height, width) {size}. "
            f"Received: (y1, x1, y2, x2) = {(y1, x1, y2, x2)}. What sticks out "
            "by a pixel or 1 % is clipped in training; for more, pass "
            "`outside='clip'` or `outside='drop'`."
        ) from error
    if not with_mask:
        return found
    if not annotation.has_mask():
        raise ValueError(
            "There is no mask. Expected: polygons or run lengths. Received: "
            f"{annotation.segmentation!r}."
        )
    return found.with_mask(from_segmentation(annotation.segmentation, size))


def bounds_of(
    polygons: Sequence[Sequence[float]],
) -> tuple[float, float, float, float]:
    """Return the box (y1, x1, y2, x2) of polygons x1, y1, x2, y2, …."""
    x = [edge for polygon in polygons for edge in polygon[::2]]
    y = [edge for polygon in polygons for edge in polygon[1::2]]
    return min(y), min(x), max(y), max(x)


def relative_name(picture: Picture, objects: ObjectSet, folder: str) -> str:
    """Return the path of a picture relative to another folder.

    Args:
        picture: `Picture` of the set.
        objects: `ObjectSet`.
        folder: str.

    Returns:
        str, with slashes; a URI is returned unchanged.
    """
    return relative_path(
        picture_path(picture.name, objects.image_folder), folder
    )


def relative_path(path: str, folder: str) -> str:
    """Return a picture's path relative to a folder; a URI unchanged."""
    if is_uri(path):
        return path
    return Path(os.path.relpath(path, folder)).as_posix()


def has_fields(extra: Mapping, known: Sequence[str] = ()) -> bool:
    """Return whether an entry has fields that another format cannot hold.

    Args:
        extra: dict, `extra` of an `Annotation` or `Picture`.
        known: names of fields that the other format has.

    Returns:
        bool. Ids and areas do not count: they can be computed again.
    """
    return bool(extra.keys() - {"id", "area", *known})


def plain_name(picture: Picture) -> str:
    """Return a relative name for a copy of a picture.

    Args:
        picture: `Picture`; one outside of its folder keeps only the last part
            of its name.
    """
    path = PurePosixPath(picture.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "://" in picture.name[:16]:
        return path.name
    # YOLO finds labels by replacing the last folder of this name.
    parents = [part for part in path.parts[:-1] if part != "images"]
    return str(PurePosixPath(*parents, path.name))


def polygons_of(
    annotation: Annotation, size: tuple[float, float]
) -> list[list[float]]:
    """Return the mask of an annotation in pixels as flat polygons.

    Args:
        annotation: `Annotation` with a mask; run lengths are converted
            exactly.
        size: (height, width) of the picture, pixels.

    Raises:
        ValueError: if the run lengths are damaged, or empty.
    """
    if not isinstance(annotation.segmentation, Mapping):
        return [list(polygon) for polygon in annotation.segmentation or ()]
    polygons = to_polygons(from_rle(annotation.segmentation, size))
    if not polygons:
        raise ValueError("The mask is empty. Expected: one pixel or more.")
    return polygons


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text file, without blank ones and outer blanks."""
    lines = file.read_text("utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def picture_files(folder: Path) -> list[Path]:
    """Return the paths of all pictures below a folder, sorted."""
    return sorted(files_below(folder, SUFFIXES))


def files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield the paths of all files below a folder that have a suffix.

    Links to folders are followed, but not to one that contains them.

    Args:
        folder: path.
        suffixes: list of str in small letters, such as ".xml".
    """
    above = {os.fspath(folder): frozenset()}
    for place, folders, names in os.walk(folder, followlinks=True):
        here = above.pop(place) | {os.path.realpath(place)}
        paths = {name: os.path.join(place, name) for name in folders}
        folders[:] = [
            name
            for name, path in paths.items()
            if os.path.realpath(path) not in here
        ]
        above |= {paths[name]: here for name in folders}
        files = (Path(place, name) for name in names)
        yield from (file for file in files if file.suffix.lower() in suffixes)
