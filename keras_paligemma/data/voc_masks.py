"""Pascal VOC's masks: pictures whose values are objects or classes.

`SegmentationObject` has the value 1 in the first object of the XML file, 2 in
the second, and so on; `SegmentationClass` has the number of the class. In both
0 is the background, and 255 a border that belongs to nothing. The values are
indices of a palette; CVAT and Datumaro write the palette's colours instead.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from keras_paligemma.data.object_set import Picture
from keras_paligemma.tasks.label_maps import from_label_map
from keras_paligemma.tasks.masks import from_segmentation
from keras_paligemma.tasks.masks import to_rle

OBJECTS, CLASSES = "SegmentationObject", "SegmentationClass"

BACKGROUND, VOID = 0, 255

# The classes of the challenge, whose files do not name them.
_CHALLENGE = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

Colour = tuple[int, ...]


class ClassValues(NamedTuple):
    """The meaning of the values of `SegmentationClass`.

    Args:
        names: class of each value; the first is the background.
        colours: (red, green, blue) of each value.
    """

    names: Sequence[str]
    colours: Sequence[Colour]


def palette() -> list[Colour]:
    """Return VOC's colour of each value, 0 to 255.

    Example:

    >>> palette()[:3], palette()[VOID]
    ([(0, 0, 0), (128, 0, 0), (0, 128, 0)], (224, 224, 192))

    Source: `VOClabelcolormap` of the challenge's development kit.
    """
    # Every third bit of a value belongs to one channel, the lowest first.
    places = np.arange(8)[:, None]
    bits = np.arange(256)[:, None, None] >> (3 * places + np.arange(3)) & 1
    colours = (bits << (7 - places)).sum(1)
    return [tuple(colour) for colour in colours.tolist()]


def class_values(
    labels: Sequence[str], listed: Sequence[tuple[str, Colour | None]] = ()
) -> ClassValues | None:
    """Return the meaning of the values of `SegmentationClass`.

    Args:
        labels: labels of all objects.
        listed: name and colour, or `None`, of each line of `labelmap.txt`.

    Returns:
        `ClassValues`: of the list, or of the challenge if all labels are among
        its classes; `None` if neither applies.
    """
    names = [name for name, _ in listed] or list(_CHALLENGE)
    if not set(labels) <= set(names):
        return None
    if names[0] != "background":
        names = ["background", *names]
        listed = [("background", None), *listed]
    colours = palette()[: len(names)]
    for value, (_, colour) in enumerate(listed[: len(colours)]):
        colours[value] = colour or colours[value]
    return ClassValues(names, colours)


def add_masks(
    picture: Picture, folder: Path, values: ClassValues | None
) -> tuple[Picture, Counter]:
    """Add masks to the objects of a picture.

    If there is only `SegmentationClass`, the pixels of a class are the mask of
    its object, provided that the class has one object in the picture.

    Args:
        picture: `Picture` in pixels; its `place` is the name of its XML file.
        folder: path that contains the folders of masks.
        values: `ClassValues`, or `None` if they are not known.

    Returns:
        `Picture`, and a Counter of masks that were not assigned to an object.

    Raises:
        ImportError: if pycocotools is not installed.
    """
    name = Path(picture.place).with_suffix(".png")
    lost = Counter()
    try:
        if (folder / OBJECTS / name).is_file():
            found = _read(folder / OBJECTS / name, palette())
            masks = {value - 1: mask for value, mask in found.items()}
        elif (folder / CLASSES / name).is_file():
            if values is None:
                lost["pictures of classes without a labelmap.txt"] += 1
                return picture, lost
            found = _read(folder / CLASSES / name, values.colours)
            masks = _of_classes(found, picture, values.names, lost)
        else:
            return picture, lost
    except ValueError:
        lost["pictures of masks that cannot be read"] += 1
        return picture, lost
    annotations = list(picture.annotations)
    for number, mask in masks.items():
        if number >= len(annotations):
            lost["masks of no object"] += 1
        elif _is_outside(mask, annotations[number].box):
            lost["masks outside of the boxes of their objects"] += 1
        else:
            annotations[number] = dataclasses.replace(
                annotations[number], segmentation=to_rle(mask)
            )
    return dataclasses.replace(picture, annotations=annotations), lost


def write_masks(
    picture: Picture, folder: Path, name: str, classes: Sequence[str]
) -> Counter:
    """Write the masks of a picture as `SegmentationObject` and `…Class`.

    Each pixel belongs to one object: where masks overlap, to the smallest.

    Args:
        picture: `Picture` in pixels, with readable masks or none.
        folder: path that will contain the folders of masks.
        name: str, of the files, without suffix.
        classes: names of all classes, which get the values 1, 2, ….

    Returns:
        Counter of what these pictures cannot hold.

    Raises:
        ImportError: if pycocotools is not installed, and a mask is a polygon.
    """
    lost = Counter()
    height, width = map(int, picture.known_size())
    masks = {}
    for value, annotation in enumerate(picture.annotations, 1):
        if not annotation.has_mask():
            continue
        if value >= VOID:
            lost[f"masks beyond {VOID - 1} in a picture"] += 1
            continue
        lost["polygons written as pixels"] += isinstance(
            annotation.segmentation, list
        )
        masks[value] = from_segmentation(
            annotation.segmentation, (height, width)
        )
    if not masks:
        return lost
    objects = np.full((height, width), BACKGROUND, "uint8")
    for value in sorted(masks, key=lambda value: -masks[value].sum()):
        objects[masks[value]] = value
    for value, mask in masks.items():
        lost["masks cut where they overlap"] += bool(
            (objects[mask] != value).any()
        )
    numbers = {label: number for number, label in enumerate(classes, 1)}
    of_class = np.zeros(256, "uint8")
    for value in masks:
        number = numbers[picture.annotations[value - 1].label]
        of_class[value] = min(number, VOID)
    _save(objects, folder / OBJECTS / f"{name}.png")
    _save(of_class[objects], folder / CLASSES / f"{name}.png")
    return lost


def _read(path, colours):
    """Return masks by value; the picture holds values or their colours."""
    try:
        with Image.open(path) as opened:
            opened.load()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if opened.mode not in ("RGB", "RGBA"):
        return from_label_map(opened, (BACKGROUND, VOID))
    void = palette()[VOID]
    values = {
        red + 256 * green + 65536 * blue: value
        for value, (red, green, blue) in [(VOID, void), *enumerate(colours)]
    }
    found = from_label_map(opened.convert("RGB"), ())
    if not found.keys() <= values.keys():
        raise ValueError(f"{path} has colours that mean nothing.")
    return {
        values[colour]: mask
        for colour, mask in found.items()
        if values[colour] not in (BACKGROUND, VOID)
    }


def _of_classes(found, picture, names, lost):
    """Return masks by number of object, where a class has one object."""
    labels = [annotation.label for annotation in picture.annotations]
    masks = {}
    for value, mask in found.items():
        name = names[value] if value < len(names) else None
        if labels.count(name) == 1:
            masks[labels.index(name)] = mask
        elif name in labels:
            lost["masks of classes that several objects share"] += 1
        else:
            lost["masks of no object"] += 1
    return masks


def _is_outside(mask, box):
    """Return whether most of a mask is outside of a box."""
    if box is None:
        return False
    y1, x1, y2, x2 = (max(round(edge), 0) for edge in box)
    return 2 * mask[y1:y2, x1:x2].sum() < mask.sum()


def _save(values, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    picture.putpalette([part for colour in palette() for part in colour])
    picture.save(path)
