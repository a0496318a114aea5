"""Data sets of objects as `detect` and `segment` examples."""

import collections
import os
import warnings
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import located
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import check_size
from keras_paligemma.data.object_set import in_pixels
from keras_paligemma.data.object_set import object_of
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.tasks import prompts
from keras_paligemma.tasks.answers import write_object
from keras_paligemma.tasks.mask_codec import BOOK
from keras_paligemma.tasks.mask_codec import CODES
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.masks import import_pycocotools
from keras_paligemma.tasks.objects import Object
from keras_paligemma.tasks.prompts import SEPARATOR

_ASK = {"detect": prompts.detect, "segment": prompts.segment}


class ObjectSource:
    """Examples of a data set of objects, one per picture.

    | task | prompt | answer |
    |---|---|---|
    | detect | `detect cat ; dog` | `<loc…>×4 cat ; <loc…>×4 dog` |
    | segment | `segment cat` | `<loc…>×4<seg…>×16 cat` |

    Answers list the classes in the order of the prompt, and the objects of a
    class in the order of the file. Pictures are not decoded here.

    A box that exceeds its picture by up to one pixel or 1 % of the side is
    clipped: the rounding of exporters causes that. A crowd with a mask is an
    object like others: CVAT and Datumaro mark all brush masks as crowds, and
    COCO marks groups.

    Args:
        data: `ObjectSet`, as `open_objects` returns it.
        task: "detect" or "segment".
        classes: list of str, the labels of every prompt, in this order. `None`
            uses the labels of each picture, in the order of the data set.
        keep_empty: bool, whether pictures without objects of the classes are
            examples too, with an empty answer. Requires `classes`.
        encode_mask: function for "segment" from a bool array (height, width),
            the mask within its box at the picture's resolution, to its 16
            codes, integers from 0 to 127. `None` uses the codec of the nano
            preset; published models need those of
            `MaskCodec.load("vae-oid.npz").encode_mask`.
        keep_crowds: bool, whether crowds with a mask are objects; crowds
            without a mask never are.
        outside: str, for boxes that exceed their picture by more: "error"
            raises when the example is read, "clip" clips them, "drop" leaves
            them out.

    Raises:
        ValueError: if a class is unknown, or arguments exclude each other.
        ExampleError: on `source[index]`, with picture and annotation, if a box
            is outside its picture or a mask cannot be read; the error's
            `remainder` is the example without these objects. Also if the
            picture's shape differs from that in the file.

    Attributes:
        clipped: int, number of clipped boxes.
        left_out: dict from a description to a count: crowds, objects of other
            classes, dropped boxes, pictures without an object. Crowds without
            a mask also raise a warning.
    """

    def __init__(
        self,
        data: ObjectSet,
        task: str = "detect",
        classes: Sequence[str] | None = None,
        keep_empty: bool = False,
        encode_mask: Callable[[np.ndarray], Sequence[int]] | None = None,
        keep_crowds: bool = True,
        outside: str = "error",
    ) -> None:
        if task not in _ASK:
            raise ValueError(
                f"`task` must be 'detect' or 'segment'. Received: {task!r}."
            )
        if outside not in ("error", "clip", "drop"):
            raise ValueError(
                "`outside` must be 'error', 'clip' or 'drop'. Received: "
                f"{outside!r}."
            )
        if keep_empty and classes is None:
            raise ValueError(
                "`keep_empty=True` has nothing to ask for. Expected: "
                "`classes`, the names for every prompt. Received: None."
            )
        unknown = sorted(set(classes or ()) - set(data.classes))
        if unknown:
            raise ValueError(
                f"{data.path} has no class {unknown}. Expected: some of "
                f"{sorted(data.classes)}."
            )
        if task == "segment":
            import_pycocotools()  # Raise now, not on the first example.
            encode_mask = encode_mask or MaskCodec.embedded().encode_mask
        self.data = data
        self.task = task
        self.encode_mask = encode_mask
        self.classes = list(data.classes if classes is None else classes)
        self._asks_all = classes is not None
        self.clipped = 0
        self.left_out = collections.Counter(data.skipped)
        self._index(keep_crowds, outside)
        self._rows = np.arange(len(data.pictures))
        if not keep_empty:
            self._rows = np.flatnonzero(self._ends > self._starts)
        without = len(data.pictures) - len(self._rows)
        self.left_out["pictures without an object"] += without
        # Drop zero counts.
        self.left_out = dict(+self.left_out)

    def _objects(self, keep_crowds):
        """Select the annotations that are objects; count the others.

        Returns:
            int array (2, objects) of the row of the picture and the number of
            the annotation in it, and a list of `Annotation`.
        """
        places, objects = [], []
        classes = {*self.classes}
        for row, picture in enumerate(self.data.pictures):
            for number, annotation in enumerate(picture.annotations):
                if not annotation.problem and annotation.label not in classes:
                    self.left_out["objects of other classes"] += 1
                elif annotation.is_crowd and not keep_crowds:
                    self.left_out["crowds"] += 1
                elif annotation.is_crowd and not annotation.has_mask():
                    self.left_out["crowds without a mask"] += 1
                else:
                    places.append((row, number))
                    objects.append(annotation)
        crowds = self.left_out["crowds without a mask"]
        if crowds:
            total = sum(
                len(picture.annotations) for picture in self.data.pictures
            )
            warnings.warn(
                f"{self.data.path}: crowds (iscrowd) without a mask are left "
                f"out, {crowds} of {total} annotations. Set their iscrowd to "
                "0 if their boxes are objects.",
                stacklevel=4,
            )
        return np.array(places, "int64").reshape(-1, 2).T, objects

    def _index(self, keep_crowds, outside):
        """Order objects by picture and class, and clip their boxes."""
        (rows, numbers), objects = self._objects(keep_crowds)
        place = {name: number for number, name in enumerate(self.classes)}
        classes = np.array(
            [place.get(annotation.label, len(place)) for annotation in objects],
            "int64",
        )
        pictures = self.data.pictures
        sizes = [
            (np.nan, np.nan) if picture.problem else picture.size or (1, 1)
            for picture in pictures
        ]
        # The width of a pixel; unknown if the file does not contain the size.
        pixels = [float(picture.size is not None) for picture in pictures]
        boxes, overhang, cut = clip_boxes(
            box_array(objects),
            np.array(sizes, "float64").reshape(-1, 2)[rows],
            np.array(pixels)[rows],
            np.inf if outside == "clip" else 1,
        )
        self.clipped = int(cut.sum())
        # By picture, class and place in the file: `lexsort` is stable.
        order = np.lexsort((classes, rows))
        if outside == "drop":
            outer = overhang > 1
            self.left_out["boxes outside of their pictures"] += int(outer.sum())
            order = order[~outer[order]]
        self._numbers = numbers[order]
        self._classes, self._boxes = classes[order], boxes[order]
        bounds = np.arange(len(pictures) + 1)
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
            f"{type(self).__name__}({os.fspath(self.data.path)!r}: "
            f"{len(self)} examples, {self.clipped} boxes clipped{left_out})"
        )

    def where(self, index: int) -> str:
        """Return the place of an example: data set and picture."""
        return self.data.where(self._rows[index])

    def picture(self, index: int) -> Picture:
        """Return the `Picture` of an example."""
        return self.data.pictures[self._rows[index]]

    def objects(self, index: int) -> list[Object]:
        """Return the objects of an example, as `EvaluateObjects` takes them.

        Args:
            index: int, number of the example.

        Returns:
            list of `Object`, with masks if the task is "segment".

        Raises:
            ExampleError: if an object cannot be read.
        """
        with located(self.where(index)):
            _, found, problems = self._read(index)
            if problems:
                raise ValueError(problems[0])
            return [item for _, item in found.values()]

    def __getitem__(self, index):
        with located(self.where(index)):
            path, found, problems = self._read(index)
            answers = {}
            for i, (place, item) in found.items():
                try:
                    answers[i] = write_object(item, self._codes(item))
                except ValueError as error:
                    problems.append(f"{place}: {error}")
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

    def _read(self, index):
        """Return a picture's path, its objects with places, and problems."""
        row = int(self._rows[index])
        picture = self.data.pictures[row]
        if picture.problem:
            raise ValueError(picture.problem)
        path = picture_path(picture.name, self.data.image_folder)
        unit = picture.size or (1, 1)
        sized = in_pixels(picture, self.data.image_folder)
        size = sized.known_size()
        check_size(path, size)
        scale = np.tile(np.divide(size, unit), 2)
        with_mask = self.task == "segment"
        found, problems = {}, []
        for i in range(self._starts[row], self._ends[row]):
            annotation = sized.annotations[self._numbers[i]]
            box = self._boxes[i] * scale
            try:
                item = object_of(annotation, size, box, with_mask)
                found[i] = (annotation.place, item)
            except ValueError as error:
                problems.append(f"{annotation.place}: {error}")
        return path, found, problems

    def _example(self, path, answers):
        """Return an example, from answers by number of object."""
        asked = self.classes
        if not self._asks_all:
            present = {int(self._classes[i]) for i in answers}
            asked = [self.classes[number] for number in sorted(present)]
        return {
            "images": path,
            "prompts": _ASK[self.task](asked) if asked else self.task,
            "responses": SEPARATOR.join(answers.values()),
        }

    def _codes(self, item):
        """Return the codes of an object's mask; `None` for "detect"."""
        if self.task == "detect" or self.encode_mask is None:
            return None
        codes = [int(code) for code in self.encode_mask(item.mask)]
        if len(codes) != CODES or not all(0 <= code < BOOK for code in codes):
            raise ValueError(
                f"`encode_mask` returned no mask codes. Expected: {CODES} "
                f"integers from 0 to {BOOK - 1}. Received: {codes}."
            )
        return codes


def box_array(annotations):
    """Return the boxes of `Annotation`s, (N, 4), NaN where there is none."""
    boxes = [annotation.box or (np.nan,) * 4 for annotation in annotations]
    return np.array(boxes, "float64").reshape(-1, 4)


def clip_boxes(boxes, sizes, pixels, limit):
    """Clip boxes that exceed their pictures, up to a limit.

    The tolerance is one pixel, or 1 % of the side if that is more.

    Args:
        boxes: float array (N, 4) of (y1, x1, y2, x2), in any unit.
        sizes: float array (N, 2) of (height, width), in the same unit.
        pixels: float array (N,), the width of a pixel in this unit; 0 if
            unknown.
        limit: float, clip boxes that exceed by up to this many tolerances.

    Returns:
        Array (N, 4) of boxes; array (N,) of the excess of each, in tolerances,
        infinite if no part of it is inside; and a bool array (N,), True for
        clipped boxes.
    """
    sides = np.concatenate([sizes, sizes], axis=1)
    inside = np.clip(boxes, 0, sides)
    tolerance = np.maximum(pixels[:, None], 0.01 * sides)
    overhang = np.abs(boxes - inside) / tolerance
    overhang = overhang.max(axis=1, initial=0)
    # Ignore rounding errors.
    overhang[overhang < 1e-6] = 0
    emptied = (inside[:, :2] >= inside[:, 2:]).any(axis=1)
    overhang[emptied & (overhang > 0)] = np.inf
    cut = (overhang > 0) & (overhang <= limit) & np.isfinite(overhang)
    return np.where(cut[:, None], inside, boxes), overhang, cut
