"""COCO's JSON of boxes and masks, as `detect` and `segment` examples."""

import collections
import os
import warnings
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from keras_paligemma.data.coco_file import clip_boxes
from keras_paligemma.data.coco_file import edges_of
from keras_paligemma.data.coco_file import has_mask
from keras_paligemma.data.coco_file import read_coco
from keras_paligemma.data.coco_file import size_of
from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import located
from keras_paligemma.preprocessing.images import openable
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.tasks.boxes import encode_box

ORIENTATION = Base.Orientation


class COCOSource:
    """Examples of a COCO file: a picture, its classes, their boxes or masks.

    | task | prompt | answer |
    |---|---|---|
    | detect | `detect cat ; dog` | `<loc…>×4 cat ; <loc…>×4 dog` |
    | segment | `segment cat` | `<loc…>×4<seg…>×16 cat` |

    Answers follow the classes in the order of the prompt, within a class the
    annotations in the order of the file. The JSON is read whole, as it has no
    lines; pictures are not.

    A box that sticks out of its picture by a pixel, or by 1 % of the side, is
    clipped: exporters round that way. A mask that is marked as a crowd
    (`iscrowd`) is an object like others: CVAT and Datumaro mark all masks of a
    brush so, and COCO groups.

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
        keep_crowds: bool, whether crowds that have a mask are objects; crowds
            without one never are.
        outside: what becomes of a box that sticks out further: "error" when
            its picture is asked for, "clip" cuts it to the picture, "drop"
            leaves it out.

    Raises:
        ValueError: the file is no COCO file, annotations name pictures or
            categories that are not there, or arguments do not fit together.
        ExampleError: on `source[index]`, with picture and annotation: a box
            is outside of its picture or a mask cannot be read, where the
            error's `remainder` has the other objects; or the file is of
            another shape than the JSON says.

    Attributes:
        clipped: int, boxes that were cut to their pictures.
        left_out: dict of what to how many: crowds, objects of other classes,
            boxes that were dropped, pictures without an object. A warning
            tells of crowds that have no mask.

    Example:

    ```python
    source = COCOSource("instances_train2017.json", "train2017")
    source[0]["prompts"]  # "detect person ; bicycle"
    ```

    Source: https://cocodataset.org/#format-data.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str],
        task: str = "detect",
        classes: Sequence[str] | None = None,
        keep_empty: bool = False,
        encode_mask: Callable[[np.ndarray], Sequence[int]] | None = None,
        keep_crowds: bool = True,
        outside: str = "error",
    ) -> None:
        if task not in ("detect", "segment"):
            raise ValueError(
                f"`task` must be 'detect' or 'segment'. Received: {task!r}."
            )
        if outside not in ("error", "clip", "drop"):
            raise ValueError(
                "`outside` must be 'error', 'clip' or 'drop'. Received: "
                f"{outside!r}."
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
        data = read_coco(self.path)
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
        self.clipped = 0
        self.left_out = collections.Counter()
        objects = self._objects(data["annotations"], names, keep_crowds)
        self._index(objects, names, outside)
        self._rows = np.arange(len(self._images))
        if not keep_empty:
            self._rows = np.flatnonzero(self._ends > self._starts)
        without = len(self._images) - len(self._rows)
        self.left_out["pictures without an object"] += without
        # Counts of none say nothing.
        self.left_out = dict(+self.left_out)

    def _objects(self, annotations, names, keep_crowds):
        """List the annotations that are objects; count the others."""
        objects = []
        for one in annotations:
            if names[one["category_id"]] not in self.classes:
                self.left_out["objects of other classes"] += 1
            elif one.get("iscrowd") and not keep_crowds:
                self.left_out["crowds"] += 1
            elif one.get("iscrowd") and not has_mask(one):
                self.left_out["crowds without a mask"] += 1
            else:
                objects.append(one)
        crowds = self.left_out["crowds without a mask"]
        if crowds:
            warnings.warn(
                f"{self.path}: crowds (iscrowd) without a mask are left out, "
                f"{crowds} of {len(annotations)} annotations. Set their "
                "iscrowd to 0 if their boxes are objects.",
                stacklevel=3,
            )
        return objects

    def _index(self, objects, names, outside):
        """Keep what is needed of objects, in columns, by picture."""
        row_of = {image["id"]: row for row, image in enumerate(self._images)}
        place = {name: number for number, name in enumerate(self.classes)}
        rows = np.array([row_of[one["image_id"]] for one in objects], "int64")
        classes = [place[names[one["category_id"]]] for one in objects]
        sizes = np.array([size_of(one) for one in self._images], "float64")
        boxes = [edges_of(one.get("bbox")) for one in objects]
        boxes, overhang, cut = clip_boxes(
            np.array(boxes, "float64").reshape(-1, 4),
            sizes.reshape(-1, 2)[rows],
            np.inf if outside == "clip" else 1,
        )
        self.clipped = int(cut.sum())
        # By picture, class and place in the file: `lexsort` is stable.
        order = np.lexsort((np.asarray(classes), rows))
        if outside == "drop":
            outer = overhang > 1
            self.left_out["boxes outside of their pictures"] += int(outer.sum())
            order = order[~outer[order]]
        self._classes = np.array(classes, "int64")[order]
        self._boxes = boxes[order]
        self._ids = [objects[i].get("id") for i in order]
        self._unreadable = {
            i: objects[order[i]].get("bbox")
            for i in np.flatnonzero(np.isnan(self._boxes).any(axis=1))
        }
        self._masks = []
        if self.task == "segment":
            self._masks = [objects[i].get("segmentation") for i in order]
        bounds = np.arange(len(self._images) + 1)
        bounds = np.searchsorted(rows[order], bounds)
        self._starts, self._ends = bounds[:-1], bounds[1:]

    def __len__(self):
        return len(self._rows)

    def __repr__(self):
        left_out = "".join(
            f", {number} {what} left out"
            for what, number in self.left_out.items()
        )
        return (
            f"COCOSource({os.fspath(self.path)!r}: {len(self)} examples, "
            f"{self.clipped} boxes clipped{left_out})"
        )

    def where(self, index: int) -> str:
        """Name file and picture of an example, by COCO's id."""
        return f"{self.path}, image {self._images[self._rows[index]]['id']}"

    def __getitem__(self, index):
        with located(self.where(index)):
            row = self._rows[index]
            image = self._images[row]
            size = size_of(image)
            name = image.get("file_name")
            if np.isnan(size).any() or not isinstance(name, str):
                wanted = ("file_name", "height", "width")
                received = {key: image.get(key) for key in wanted}
                raise ValueError(
                    "The picture lacks its name or size. Expected: 'file_name' "
                    "as text, 'height' and 'width' as numbers of pixels. "
                    f"Received: {received!r:.200}."
                )
            path = picture_path(name, self.image_folder)
            _check_size(path, size)
            answers, problems = {}, []
            for i in range(self._starts[row], self._ends[row]):
                try:
                    tokens = self._locate(i, size)
                except (ValueError, TypeError, KeyError) as error:
                    problems.append(f"annotation {self._ids[i]}: {error}")
                else:
                    answers[i] = f"{tokens} {self.classes[self._classes[i]]}"
            example = self._example(path, answers)
            if not problems:
                return example
            others = ""
            if problems[1:]:
                others = f" ({len(problems)} of its objects are wrong.)"
            raise ExampleError(
                f"{self.where(index)}: {problems[0]}{others}",
                remainder=example if answers else None,
            )

    def _example(self, path, answers):
        """An example of answers by the place of their object."""
        asked = self.classes
        if not self._ask_all:
            present = {int(self._classes[i]) for i in answers}
            asked = [self.classes[number] for number in sorted(present)]
        return {
            "images": path,
            "prompts": f"{self.task} {' ; '.join(asked)}",
            "responses": " ; ".join(answers.values()),
        }

    def _locate(self, i, size):
        """Tokens of one box, and of its mask."""
        if i in self._unreadable:
            raise ValueError(
                "The box does not fit COCO's format. Expected: 'bbox', four "
                "numbers [x, y, width, height] in pixels. Received: "
                f"{self._unreadable[i]!r:.80}."
            )
        box = tuple(map(float, self._boxes[i]))
        try:
            tokens = encode_box(box, size)
        except ValueError as error:
            raise ValueError(
                f"{error} What sticks out by a pixel or 1 % is clipped; for "
                "more, pass `outside='clip'` or `outside='drop'`."
            ) from error
        if self.task == "segment":
            mask = _within(_decode(self._masks[i], size), box)
            tokens += _mask_tokens(self.encode_mask(mask))
        return tokens


def _check_size(path, size):
    """Refuse a file that boxes do not fit: turned, or another picture.

    A resized copy, of the same shape, is none: boxes are shares of the sides.
    """
    try:
        with Image.open(openable(path)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except (OSError, ValueError):
        return  # Said when the picture is read.
    found = (width, height) if turned else (height, width)
    if abs(found[0] * size[1] - found[1] * size[0]) > sum(size):
        raise ValueError(
            "The picture is not of the size that its boxes were drawn on. "
            f"Expected: (height, width) {size}, or the same shape. Received: "
            f"{found}{', turned as its EXIF says' if turned else ''}, "
            f"{path:.300}."
        )


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
