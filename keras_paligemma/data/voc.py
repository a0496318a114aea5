"""Pascal VOC's XML: a file a picture, boxes in pixels."""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import has_fields
from keras_paligemma.data.object_set import picture_files
from keras_paligemma.data.object_set import plain_name

# Names of classes, a line each, as CVAT adds them.
LABEL_MAP = "labelmap.txt"

# What VOC says of an object besides; others are of other formats.
_FIELDS = ("pose", "truncated", "difficult", "occluded")
_EDGES = ("ymin", "xmin", "ymax", "xmax")
_EXPECTED = "Expected: <bndbox> with numbers <xmin>, <ymin>, <xmax>, <ymax>."


def read(
    path: Path, image_folder: str | None = None, split: str | None = None
) -> ObjectSet:
    """Read Pascal VOC's XML files as a set of objects.

    Coordinates are taken as they are, as LabelImg, CVAT and Roboflow write
    them: edges in pixels from 0. (Files of the original challenge count pixels
    from 1, so their boxes begin a pixel late.) What is marked as difficult is
    an object like others.

    Args:
        path: path of a folder with `Annotations` and `JPEGImages`, or with
            XML files beside their pictures.
        image_folder: str, folder of pictures; `JPEGImages` or that of the XML
            files if `None`.
        split: str, of `ImageSets/Main/SPLIT.txt`, which lists pictures;
            `None` takes all.

    Returns:
        `ObjectSet`, whose classes are those of CVAT's `labelmap.txt` in this
        order, then those of the objects, by name.

    Raises:
        ValueError: there is no XML file, or no such split.
    """
    folder = path / "Annotations"
    folder = folder if folder.is_dir() else path
    files = sorted(folder.rglob("*.xml"))
    if split is not None:
        listed = path / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            raise ValueError(
                f"There is no list of a split. Expected: {listed}. Received: "
                f"split={split!r}."
            )
        lines = listed.read_text("utf-8-sig").split("\n")
        stems = [line.split()[0] for line in lines if line.strip()]
        files = [folder / f"{stem}.xml" for stem in stems]
    if not files:
        raise ValueError(
            f"There is nothing to read. Expected: *.xml in {folder}. Received: "
            "none."
        )
    if image_folder is None:
        images = path / "JPEGImages"
        image_folder = os.fspath(images if images.is_dir() else folder)
    there = {
        os.path.relpath(one, image_folder).replace(os.sep, "/")
        for one in picture_files(Path(image_folder))
    }
    pictures = [_read_file(one, folder, there) for one in files]
    classes = sorted(
        {one.label for picture in pictures for one in picture.annotations}
        - {""}
    )
    listed = path / LABEL_MAP
    if listed.is_file():
        lines = listed.read_text("utf-8-sig").split("\n")
        names = [line.split(":")[0] for line in lines if line[:1] not in "# "]
        classes = dict.fromkeys([*names, *classes])
    return ObjectSet(path, os.fspath(image_folder), tuple(classes), pictures)


def write(objects: ObjectSet, folder: Path) -> Counter:
    """Write a set of objects as Pascal VOC's XML, without its pictures.

    Args:
        objects: `ObjectSet` of pictures in pixels, without problems.
        folder: path of an empty folder, which gets `Annotations`, a list of
            them in `ImageSets/Main/train.txt`, and CVAT's `labelmap.txt`;
            pictures belong into `JPEGImages`.

    Returns:
        Counter of what the format cannot hold.
    """
    lost, stems = Counter(), []
    for picture in objects.pictures:
        name = plain_name(picture)
        root = ElementTree.Element("annotation")
        _put(root, "folder", "JPEGImages")
        _put(root, "filename", name)
        size = ElementTree.SubElement(root, "size")
        height, width = picture.known_size()
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            _put(size, tag, value)
        _put(root, "segmented", 0)
        for one in picture.annotations:
            root.append(_element(one))
            lost["masks"] += one.has_mask()
            lost["scores"] += one.score is not None
            lost["marks of crowds"] += one.is_crowd
            lost["fields of other formats"] += has_fields(one.extra, _FIELDS)
        lost["fields of other formats"] += has_fields(picture.extra)
        ElementTree.indent(root)
        stem = Path(name).with_suffix("").as_posix()
        file = folder / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(root).write(file, "utf-8")
        stems.append(stem)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(
        "".join(f"{stem}\n" for stem in stems), encoding="utf-8"
    )
    lines = "".join(f"{name}:::\n" for name in objects.classes)
    (folder / LABEL_MAP).write_text(
        f"# label:color_rgb:parts:actions\n{lines}", encoding="utf-8"
    )
    return +lost


def _read_file(file, folder, there):
    place = os.path.relpath(file, folder)
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        problem = f"The file is no XML. Received: {error}."
        return Picture("", (), place=place, problem=problem)
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
        _annotation(one, f"object {number}")
        for number, one in enumerate(root.iter("object"), 1)
    )
    name = _name(root, Path(place), there)
    return Picture(name, annotations, size, place, problem=problem)


def _name(root, place, there):
    """The picture that is there: as the file says, or of the file's name."""
    said = (root.findtext("filename") or "").replace("\\", "/")
    beside = place.with_suffix("").as_posix()
    suffixes = (".jpg", ".jpeg", ".png", ".JPG", ".webp", ".bmp")
    names = [said, (place.parent / said).as_posix()]
    names += [beside + suffix for suffix in suffixes]
    return next((name for name in names if name in there), said or names[2])


def _annotation(one, place):
    label = (one.findtext("name") or "").strip()
    texts = [one.findtext(f"bndbox/{edge}") for edge in _EDGES]
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
        if (text := one.findtext(field)) is not None
    }
    return Annotation(label, box, place=place, extra=extra, problem=problem)


def _element(one):
    element = ElementTree.Element("object")
    _put(element, "name", one.label)
    for field in _FIELDS:
        if field in one.extra:
            _put(element, field, one.extra[field])
    box = ElementTree.SubElement(element, "bndbox")
    for edge, value in zip(_EDGES, one.box, strict=True):
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
