"""Read and write Pascal VOC: an XML file per picture, boxes in pixels."""

import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from keras_paligemma.data import voc_masks
from keras_paligemma.data.object_set import UNKNOWN
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import files_below
from keras_paligemma.data.object_set import has_fields
from keras_paligemma.data.object_set import lines_of
from keras_paligemma.data.object_set import picture_files
from keras_paligemma.data.object_set import plain_name

# Class names, one per line, in a file that CVAT adds.
LABEL_MAP = "labelmap.txt"
# Name, colour, parts and actions.
_LABEL = re.compile(r"(.*?):(\d+,\d+,\d+)?(?::.*)?")

# Whether a picture shows a class, in the challenge's lists of that class.
_FLAG = re.compile(r"\s+(?:-1|0|1)$")

# VOC's other fields of an object.
_FIELDS = ("pose", "truncated", "difficult", "occluded")
_EDGES = ("ymin", "xmin", "ymax", "xmax")
_EXPECTED = "Expected: <bndbox> with numbers <xmin>, <ymin>, <xmax>, <ymax>."


def read(
    path: Path,
    image_folder: str | None = None,
    listed: Path | None = None,
    with_masks: bool = True,
) -> ObjectSet:
    """Read Pascal VOC's XML files and masks as a set of objects.

    Coordinates are read as LabelImg, CVAT and Roboflow write them: edges in
    pixels, counted from 0. The original challenge counts from 1, so its boxes
    start one pixel late. Objects marked as difficult are objects like others.
    Masks are those of `SegmentationObject`, see `voc_masks`.

    Args:
        path: path of a folder with `Annotations` and `JPEGImages`, or with
            XML files beside their pictures.
        image_folder: str, folder of pictures; `JPEGImages`, `images`, as Label
            Studio has it, or that of the XML files if `None`.
        listed: path of a text file that lists pictures, see `split_file`;
            `None` reads all XML files.
        with_masks: bool, whether to read masks.

    Returns:
        `ObjectSet`. Its classes are those of CVAT's `labelmap.txt`, in order,
        then those of the objects, sorted. `skipped` counts masks that fit no
        object.

    Raises:
        ValueError: if there are no XML files.
        ImportError: if pycocotools is not installed, and there are masks.
    """
    folder = path / "Annotations"
    folder = folder if folder.is_dir() else path
    files = sorted(files_below(folder, (".xml",)))
    if listed is not None:
        files = [_listed_file(folder, stem) for stem in lines_of(listed)]
    if not files:
        raise ValueError(
            f"There is nothing to read. Expected: *.xml in {folder}. Received: "
            "none."
        )
    if image_folder is None:
        places = [path / "JPEGImages", path / "images", folder]
        image_folder = os.fspath(next(filter(Path.is_dir, places)))
    existing = {
        os.path.relpath(file, image_folder).replace(os.sep, "/")
        for file in picture_files(Path(image_folder))
    }
    pictures = [_read_file(file, folder, existing) for file in files]
    labels = {
        annotation.label
        for picture in pictures
        for annotation in picture.annotations
    } - {""}
    label_map = _read_label_map(path / LABEL_MAP)
    skipped = Counter()
    if with_masks:
        values = voc_masks.class_values(sorted(labels), label_map)
        for row, picture in enumerate(pictures):
            if not picture.problem:
                pictures[row], lost = voc_masks.add_masks(picture, path, values)
                skipped += lost
    names = [name for name, _ in label_map]
    # CVAT lists the background first.
    names = names[names[:1] == ["background"] :]
    classes = dict.fromkeys([*names, *sorted(labels)])
    return ObjectSet(
        path, os.fspath(image_folder), tuple(classes), pictures, skipped
    )


def split_file(path: Path, split: str, for_masks: bool) -> Path | None:
    """Return the list of a split's pictures, in `ImageSets`.

    Args:
        path: path of the data set's folder.
        split: str, such as "train".
        for_masks: bool, whether to prefer the list in `Segmentation`, of the
            pictures with masks, to that in `Main`.

    Returns:
        Path of the text file; `None` if there is none.
    """
    kinds = ("Segmentation", "Main") if for_masks else ("Main", "Segmentation")
    files = [path / "ImageSets" / kind / f"{split}.txt" for kind in kinds]
    return next((file for file in files if file.is_file()), None)


def write(objects: ObjectSet, folder: Path) -> Counter:
    """Write a set of objects as Pascal VOC's XML and masks, without pictures.

    Args:
        objects: `ObjectSet` of pictures in pixels, without problems.
        folder: path of an empty folder, which gets `Annotations`, lists of
            pictures in `ImageSets`, CVAT's `labelmap.txt`, and pictures of
            masks if there are any, see `voc_masks`. Pictures belong into
            `JPEGImages`.

    Returns:
        Counter of what the format cannot hold.
    """
    lost, stems, with_masks = Counter(), [], []
    for picture in objects.pictures:
        name = plain_name(picture)
        stem = Path(name).with_suffix("").as_posix()
        has_masks = any(
            annotation.has_mask() for annotation in picture.annotations
        )
        for annotation in picture.annotations:
            extra = annotation.extra
            lost["scores"] += annotation.score is not None
            lost["marks of crowds"] += annotation.is_crowd
            lost["fields of other formats"] += has_fields(extra, _FIELDS)
        lost["fields of other formats"] += has_fields(picture.extra)
        if has_masks:
            with_masks.append(stem)
            lost += voc_masks.write_masks(
                picture, folder, stem, objects.classes
            )
        file = folder / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = ElementTree.ElementTree(_root(picture, name, has_masks))
        tree.write(file, "utf-8")
        stems.append(stem)
    _write_list(folder / "ImageSets" / "Main" / "train.txt", stems)
    if with_masks:
        _write_list(
            folder / "ImageSets" / "Segmentation" / "train.txt", with_masks
        )
    colours = voc_masks.palette()
    names = ["background", *objects.classes]
    lost["blanks around names"] += sum(name != name.strip() for name in names)
    lines = ["# label:color_rgb:parts:actions"]
    for number, name in enumerate(names):
        colour = colours[min(number, voc_masks.VOID)]
        lines.append(f"{name}:{','.join(map(str, colour))}::")
    _write_list(folder / LABEL_MAP, lines)
    return +lost


def _listed_file(folder, stem):
    """Return the XML file of a line; the name may have blanks, or a flag."""
    file = folder / f"{stem}.xml"
    return file if file.is_file() else folder / f"{_FLAG.sub('', stem)}.xml"


def _write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def _read_label_map(path):
    """Return name and colour, or `None`, of each class of a label map."""
    if not path.is_file():
        return []
    classes = []
    for line in lines_of(path):
        # A name may have colons, and begin with "#" if a colour follows.
        found = _LABEL.fullmatch(line)
        name, colour = found.groups() if found else (line, None)
        if not name or (name.startswith("#") and colour is None):
            continue
        parts = colour and tuple(map(int, colour.split(",")))
        classes.append((name, parts))
    return classes


def _read_file(file, folder, existing):
    place = os.path.relpath(file, folder)
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        problem = (
            "The file is no XML that Python reads. Expected: XML, such as in "
            f"UTF-8. Received: {error}."
        )
        return Picture("", UNKNOWN, place=place, problem=problem)
    edges = [root.findtext(f"size/{side}") for side in ("height", "width")]
    height, width = map(_number, edges)
    size, problem = None, ""
    if height is None or width is None or min(height, width) <= 0:
        problem = (
            "The picture lacks its size. Expected: <size> with <height> and "
            f"<width> in pixels. Received: {edges}."
        )
    elif height.is_integer() and width.is_integer():
        size = int(height), int(width)
    else:
        size = height, width
    annotations = tuple(
        _annotation(element, f"object {number}")
        for number, element in enumerate(root.iter("object"), 1)
    )
    name = _name(root, Path(place), existing)
    return Picture(name, annotations, size, place, problem=problem)


def _name(root, place, existing):
    """Return the existing picture: by `filename`, or by the XML file's name."""
    named = (root.findtext("filename") or "").replace("\\", "/")
    beside = place.with_suffix("").as_posix()
    suffixes = (".jpg", ".jpeg", ".png", ".JPG", ".webp", ".bmp")
    names = [named, (place.parent / named).as_posix()]
    names += [beside + suffix for suffix in suffixes]
    return next((name for name in names if name in existing), named or names[2])


def _annotation(element, place):
    label = (element.findtext("name") or "").strip()
    texts = [element.findtext(f"bndbox/{edge}") for edge in _EDGES]
    y1, x1, y2, x2 = map(_number, texts)
    box = None
    if y1 is not None and x1 is not None and y2 is not None and x2 is not None:
        box = y1, x1, y2, x2
    problem = ""
    if not label:
        problem = "The object has no name. Expected: <name>. Received: none."
    elif box is None:
        problem = f"The box is none. {_EXPECTED} Received: {texts}."
    extra = {
        field: int(text) if text.strip().isdigit() else text.strip()
        for field in _FIELDS
        if (text := element.findtext(field)) is not None
    }
    return Annotation(label, box, place=place, extra=extra, problem=problem)


def _root(picture, name, has_masks):
    """Return the content of a picture's file."""
    root = ElementTree.Element("annotation")
    _put(root, "folder", "JPEGImages")
    _put(root, "filename", name)
    size = ElementTree.SubElement(root, "size")
    height, width = picture.known_size()
    for tag, value in (("width", width), ("height", height), ("depth", 3)):
        _put(size, tag, value)
    _put(root, "segmented", int(has_masks))
    for annotation in picture.annotations:
        root.append(_element(annotation))
    ElementTree.indent(root)
    return root


def _element(annotation):
    element = ElementTree.Element("object")
    _put(element, "name", annotation.label)
    for field in _FIELDS:
        if field in annotation.extra:
            _put(element, field, annotation.extra[field])
    box = ElementTree.SubElement(element, "bndbox")
    for edge, value in zip(_EDGES, annotation.box, strict=True):
        _put(box, edge, value)
    return element


def _put(parent, tag, value):
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    ElementTree.SubElement(parent, tag).text = str(value)


def _number(text):
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None
