"""COCO's JSON of boxes and masks, as `detect` and `segment` examples."""

import collections
import json
import os
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from keras_paligemma.data.examples import located
from keras_paligemma.tasks.boxes import encode_box

ORIENTATION = Base.Orientation

# What the index is made of; the rest is asked for with its picture.
_NEEDED = {
    "images": {"id"},
    "categories": {"id", "name"},
    "annotations": {"image_id", "category_id"},
}


class COCOSource:
    """Examples of a COCO file: a picture, its classes, their boxes or masks.

    | task | prompt | answer |
    |---|---|---|
    | detect | `detect cat ; dog` | `<loc…>×4 cat ; <loc…>×4 dog` |
    | segment | `segment cat` | `<loc…>×4<seg…>×16 cat` |

    Answers follow the classes in the order of the prompt, within a class the
    annotations in the order of the file. Crowds (`iscrowd`) are left out. The
    JSON is read whole, as it has no lines; pictures are not.

    Args:
        path: str or path of the JSON file.
        image_folder: str or path that `file_name` is relative to.
        task: "detect" or "segment".
        classes: names to ask for in every prompt, in this order; `None` asks
            for those that the picture has, in the order of the file's
            categories.
        keep_empty: bool, whether pictures with none of the classes are
            examples too, with an empty answer. Needs `classes`.
        encode_mask: function that "segment" needs: of a bool array (height,
            width), the mask within its box, at the picture's resolution; it
            returns the 16 codes, integers from 0 to 127.

    Raises:
        ValueError: the file is no COCO file, annotations name pictures or
            categories that are not there, or arguments do not fit together.
        ExampleError: on `source[index]`, with picture and annotation: a box
            is outside of its picture, a mask cannot be read, or the file is of
            another shape than the JSON says.

    Example:

    ```python
    source = COCOSource("instances_train2017.json", "train2017")
    source[0]["prompts"]  # "detect person ; bicycle"
    ```

    Source: https://cocodataset.org/#format-data.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_folder: str | os.PathLike,
        task: str = "detect",
        classes: Sequence[str] | None = None,
        keep_empty: bool = False,
        encode_mask: Callable[[np.ndarray], Sequence[int]] | None = None,
    ):
        if task not in ("detect", "segment"):
            raise ValueError(
                f"`task` must be 'detect' or 'segment'. Received: {task!r}."
            )
        if task == "segment":
            _check_masks(encode_mask)
        if keep_empty and classes is None:
            raise ValueError(
                "`keep_empty=True` has nothing to ask for. Expected: "
                "`classes`, the names for every prompt. Received: None."
            )
        self.path = Path(path)
        self.image_folder = os.fspath(image_folder)
        self.task = task
        self.encode_mask = encode_mask
        data = _read(self.path)
        try:
            self._take(data, classes, keep_empty)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is no COCO file: a field is of another type. "
                "Expected: numbers as ids, and strings as names. Received: "
                f"{error!r}."
            ) from error

    def _take(self, data, classes, keep_empty):
        """Keep the pictures and categories, and an index of annotations."""
        _check_entries(self.path, data)
        _refuse_twins(self.path, data)
        names = {one["id"]: one["name"] for one in data["categories"]}
        self.classes = list(names.values() if classes is None else classes)
        self._ask_all = classes is not None
        unknown = sorted(set(self.classes) - set(names.values()))
        if unknown:
            raise ValueError(
                f"{self.path} has no class {unknown}. Expected: some of "
                f"{sorted(names.values())}."
            )
        self._images = data["images"]
        self._index(data["annotations"], names, keep_empty)

    def _index(self, annotations, names, keep_empty):
        """Keep what is needed of annotations, in columns, by picture."""
        row_of = {image["id"]: row for row, image in enumerate(self._images)}
        class_of = {
            id: self.classes.index(name)
            for id, name in names.items()
            if name in self.classes
        }
        rows, classes, boxes, ids, masks = [], [], [], [], []
        for one in annotations:
            if one.get("iscrowd"):
                continue
            if one["image_id"] not in row_of or one["category_id"] not in names:
                raise ValueError(
                    f"{self.path}, annotation {one.get('id')}: its picture or "
                    "category is not in the file. Received: image_id="
                    f"{one['image_id']}, category_id={one['category_id']}."
                )
            if one["category_id"] not in class_of:
                continue
            boxes.append(_box(one.get("bbox")))
            rows.append(row_of[one["image_id"]])
            classes.append(class_of[one["category_id"]])
            ids.append(one.get("id"))
            if self.task == "segment":
                masks.append(one.get("segmentation"))
        # By picture, class and place in the file: `lexsort` is stable.
        order = np.lexsort((classes, rows))
        self._classes = np.array(classes, "int64")[order]
        self._boxes = np.array(boxes, "float64").reshape(-1, 4)[order]
        self._ids = [ids[i] for i in order]
        self._masks = [masks[i] for i in order] if masks else []
        bounds = np.arange(len(self._images) + 1)
        bounds = np.searchsorted(np.array(rows, "int64")[order], bounds)
        self._starts, self._ends = bounds[:-1], bounds[1:]
        keep = self._ends > self._starts
        self._rows = np.flatnonzero(keep | keep_empty)

    def __len__(self):
        return len(self._rows)

    def where(self, index: int) -> str:
        """Name file and picture of an example, by COCO's id."""
        return f"{self.path}, image {self._images[self._rows[index]]['id']}"

    def __getitem__(self, index):
        with located(self.where(index)):
            row = self._rows[index]
            image = self._images[row]
            missing = {"file_name", "height", "width"} - set(image)
            if missing:
                raise ValueError(
                    "The picture lacks a field. Expected: 'file_name', "
                    f"'height' and 'width'. Received: {sorted(image)}."
                )
            size = (image["height"], image["width"])
            here = range(self._starts[row], self._ends[row])
            if self._ask_all:
                asked = self.classes
            else:
                present = np.unique(self._classes[here.start : here.stop])
                asked = [self.classes[i] for i in present]
            answers = [
                f"{self._locate(i, size)} {self.classes[self._classes[i]]}"
                for i in here
            ]
            path = os.path.join(self.image_folder, image["file_name"])
            _check_size(path, size)
            return {
                "images": path,
                "prompts": f"{self.task} {' ; '.join(asked)}",
                "responses": " ; ".join(answers),
            }

    def _locate(self, i, size):
        """Tokens of one box, and of its mask."""
        x, y, width, height = self._boxes[i]
        box = tuple(map(float, (y, x, y + height, x + width)))
        try:
            tokens = encode_box(box, size)
            if self.task == "segment":
                mask = _within(_decode(self._masks[i], size), box)
                tokens += _mask_tokens(self.encode_mask(mask))
        except (ValueError, TypeError) as error:
            raise ValueError(f"annotation {self._ids[i]}: {error}") from error
        return tokens


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


def _check_size(path, size):
    """Refuse a file that boxes do not fit: turned, or another picture.

    A resized copy, of the same shape, is none: boxes are shares of the sides.
    """
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except OSError:
        return  # Said when the picture is read.
    found = (width, height) if turned else (height, width)
    if abs(found[0] * size[1] - found[1] * size[0]) > sum(size):
        raise ValueError(
            "The picture is not of the size that its boxes were drawn on. "
            f"Expected: (height, width) {size}, or the same shape. Received: "
            f"{found}{', turned as its EXIF says' if turned else ''}, {path}."
        )


def _box(box):
    """Four numbers; nan, which fits no picture, for anything else."""
    if (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(edge, (int, float)) for edge in box)
    ):
        return box
    return [np.nan] * 4


def _check_masks(encode_mask):
    if encode_mask is None:
        raise ValueError(
            "Masks become codes by a trained encoder, which is not part of a "
            "COCO file. Expected: `encode_mask`, a function of a bool array "
            "(height, width) that returns 16 integers from 0 to 127. "
            "Received: None. To train on boxes alone, pass task='detect'."
        )
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "Reading COCO's masks needs pycocotools. Install it with "
            "`pip install 'keras_paligemma[eval]'`."
        ) from error


def _decode(segmentation, size):
    """Polygons or run lengths to a bool array of the picture's size."""
    from pycocotools import mask as codec

    if not segmentation:
        raise ValueError(
            "There is no mask. Expected: polygons or run lengths in "
            f"'segmentation'. Received: {segmentation!r}."
        )
    runs = segmentation
    if isinstance(segmentation, list):
        runs = codec.merge(codec.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        runs = codec.frPyObjects(segmentation, *size)
    mask = codec.decode(runs).astype(bool)
    if mask.shape != tuple(size):
        raise ValueError(
            f"The mask has another size than the picture. Expected: {size}. "
            f"Received: {mask.shape}."
        )
    return mask


def _within(mask, box):
    """Cut a mask to its box, at whole pixels and at least one of them."""
    y1, x1, y2, x2 = (max(round(edge), 0) for edge in box)
    mask = mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    if not mask.any():
        raise ValueError(
            "The mask is empty within its box. Expected: at least one pixel. "
            f"Received: box (y1, x1, y2, x2) = {box}."
        )
    return mask


def _mask_tokens(codes):
    codes = [int(code) for code in codes]
    if len(codes) != 16 or not all(0 <= code < 128 for code in codes):
        raise ValueError(
            "`encode_mask` returned no mask codes. Expected: 16 integers from "
            f"0 to 127. Received: {codes}."
        )
    return "".join(f"<seg{code:03d}>" for code in codes)
