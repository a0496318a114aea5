"""Open data sets of any format, recognised by their content."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_paligemma.data import coco_file
from keras_paligemma.data import object_lines
from keras_paligemma.data import voc
from keras_paligemma.data import yolo
from keras_paligemma.data.conversations import ConversationSource
from keras_paligemma.data.jsonl import JSONLSource
from keras_paligemma.data.jsonl import starts_array
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import files_below
from keras_paligemma.data.object_source import ObjectSource
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.types import PathLike

_KNOWN = (
    "a JSONL file, a COCO JSON file, YOLO's data.yaml or classes.txt, a "
    "folder of Pascal VOC's XML files, or a folder that holds one of these"
)

# What Label Studio and Datumaro write beside a data set of another format.
_NOTES = ("notes.json", "dataset_meta.json")

# Roboflow names the folder of the validation split "valid".
_SPLIT_FOLDERS = {"val": ("val", "valid"), "validation": ("valid", "val")}


def open_source(
    path: PathLike,
    image_folder: PathLike | None = None,
    split: str = "train",
    task: str = "detect",
    codec: MaskCodec | None = None,
    allow_empty: bool = False,
    **options: Any,
) -> Any:
    """Open a data set of any format as training examples.

    | format | recognised by |
    |---|---|
    | JSONL, conversations | `*.jsonl`, or a JSON array |
    | COCO, also by Roboflow, CVAT, Label Studio | `*.json`, an object |
    | YOLO, boxes or polygons | `data.yaml`, `classes.txt` |
    | Pascal VOC | `*.xml`, in `Annotations` or beside the pictures |

    Args:
        path: str or path of the file, of a folder that contains it, or of a
            folder with a subfolder per split.
        image_folder: str or path of the pictures; found beside the file if
            `None`.
        split: str, the part to open if a folder contains several.
        task: "detect" or "segment", for data sets of objects. Masks are only
            read for "segment".
        codec: `MaskCodec` that encodes masks; that of the nano preset if
            `None`. Published models need that of `vae-oid.npz`.
        allow_empty: bool, whether answers in JSONL may be empty.
        **options: as `ObjectSource` takes them, for data sets of objects.

    Returns:
        `JSONLSource`, `ConversationSource` or `ObjectSource`.

    Raises:
        ValueError: if the format is not recognised, or the folder contains
            several data sets.

    Example:

    ```python
    source = open_source("roboflow_export", split="train", task="segment")
    ```
    """
    kind, found = recognise(path, split)
    if kind in ("jsonl", "conversations") and options:
        raise ValueError(
            f"{found} holds prompts and answers, and has no "
            f"{', '.join(sorted(options))}. Expected: no such options, or a "
            "data set of objects."
        )
    if kind == "jsonl":
        return JSONLSource(found, _text(image_folder), allow_empty)
    if kind == "conversations":
        return ConversationSource(
            found, _text(image_folder), allow_empty=allow_empty
        )
    objects = _READERS[kind](found, _text(image_folder), split, codec, task)
    encode_mask = None if codec is None else codec.encode_mask
    return ObjectSource(objects, task, encode_mask=encode_mask, **options)


def open_objects(
    path: PathLike,
    image_folder: PathLike | None = None,
    split: str = "train",
    codec: MaskCodec | None = None,
) -> ObjectSet:
    """Open the annotations of a data set of objects of any format.

    Args and errors are those of `open_source`. For JSONL, the answers to
    `detect` and `segment` are parsed.

    Returns:
        `ObjectSet`.
    """
    kind, found = recognise(path, split)
    if kind not in _READERS:
        raise ValueError(
            f"These are no objects on pictures. Received: {found}, of "
            f"{kind}. Expected: {_KNOWN}."
        )
    return _READERS[kind](found, _text(image_folder), split, codec, None)


def recognise(path: PathLike, split: str) -> tuple[str, Path]:
    """Return the format of a file or folder, and the path to read.

    Args:
        path: str or path.
        split: str, the part to take if a folder contains several.

    Returns:
        "jsonl", "conversations", "coco", "yolo" or "voc", and a path.

    Raises:
        ValueError: if the format is not recognised, or the folder contains
            several data sets.
    """
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return _kind_of_file(path), path
    if not path.is_dir():
        raise ValueError(
            f"The data does not exist. Expected: {_KNOWN}. Received: "
            f"{os.fspath(path)!r}."
        )
    found = _in_folder(path, split)
    folders = _SPLIT_FOLDERS.get(split, (split,))
    if not found:
        parts = [path / name for name in folders if (path / name).is_dir()]
        found = [pair for part in parts for pair in _in_folder(part, split)]
    if len(found) != 1:
        received = [f"{kind}: {file}" for kind, file in found] or "none"
        raise ValueError(
            f"{path} holds no data set that could be told. Expected: "
            f"{_KNOWN}, one of them for the split {split!r}. Received: "
            f"{received}. Name the file, or the split."
        )
    return found[0]


def _kind_of_file(file):
    if file.suffix in (".yaml", ".yml") or file.name == "classes.txt":
        return "yolo"
    if file.suffix == ".json" and not starts_array(file):
        return "coco"
    if file.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"The data is of no known format. Expected: {_KNOWN}. Received: "
            f"{os.fspath(file)!r}."
        )
    if starts_array(file):
        return "conversations"
    source = JSONLSource(file)
    record = None
    if len(source):
        try:
            record = source.record(0)
        except ValueError:
            return "jsonl"  # The error is raised when the line is read.
    turns = {"conversations", "messages"}
    is_turns = isinstance(record, dict) and turns & record.keys()
    return "conversations" if is_turns else "jsonl"


def _in_folder(folder, split):
    """Return format and path of the data sets directly in a folder."""
    found = []
    if any((folder / name).is_file() for name in ("data.yaml", "classes.txt")):
        found.append(("yolo", folder))
    if any(files_below(folder, (".xml",))):
        found.append(("voc", folder))
    files = _of_split(folder.glob("*.jsonl"), split)
    found += [(_kind_of_file(file), file) for file in files]
    files = [*folder.glob("*.json"), *(folder / "annotations").glob("*.json")]
    files = [file for file in files if file.name not in _NOTES]
    return found + [("coco", file) for file in _of_split(files, split)]


def _of_split(files, split):
    """Return the files whose names contain the split, if there are several."""
    files = sorted(files)
    if len(files) < 2:
        return files
    found = [file for file in files if split in file.stem]
    # COCO also has captions and keypoints of the same pictures.
    instances = [file for file in found if file.stem.startswith("instances")]
    return instances or found


def _read_coco(file, image_folder, split, codec, task):
    """Read a COCO file; find the folder that contains its first picture."""
    objects = coco_file.read(file, image_folder or os.fspath(file.parent))
    if image_folder is not None or not objects.pictures:
        return objects
    home = file.parent.parent if file.parent.name == "annotations" else None
    folders = [file.parent, file.parent / "images"]
    if home is not None:
        own = file.stem.removeprefix("instances_")
        folders += [home / "images", home / own, home / "images" / own, home]
    first = objects.pictures[0].name
    for folder in folders:
        if os.path.isfile(picture_path(first, os.fspath(folder))):
            return dataclasses.replace(objects, image_folder=os.fspath(folder))
    return objects


def _read_voc(folder, image_folder, split, codec, task):
    listed = voc.split_file(folder, split, task == "segment")
    return voc.read(folder, image_folder, listed, task != "detect")


_READERS: dict[str, Callable[..., ObjectSet]] = {
    "coco": _read_coco,
    "yolo": lambda path, images, split, codec, task: yolo.read(
        path, images, split
    ),
    "voc": _read_voc,
    "jsonl": lambda path, images, split, codec, task: object_lines.read(
        path, images, codec
    ),
}


def _text(path: PathLike | None) -> str | None:
    return None if path is None else os.path.expanduser(path)
