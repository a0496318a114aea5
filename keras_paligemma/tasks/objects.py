"""Objects in a picture, with boxes, labels, scores and masks."""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_paligemma.tasks import drawing
from keras_paligemma.tasks import masks

# Longer side of pictures in notebooks, pixels: notebooks store them.
_SHOWN = 1024

# Boxes may exceed the picture by rounding errors of float32.
_SLACK = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Object:
    """An object in a picture of any size.

    Args:
        box: (y1, x1, y2, x2) as fractions of the picture's height and width, 0
            to 1, in the order of the model's tokens.
        label: str, its class or description; may be empty.
        score: float, the model's confidence; `None` if unknown, as for ground
            truth. See `tasks.scores`.
        mask: array (height, width) that fills the box, at any resolution:
            bool, or float, above 0 inside the object; or `None`.

    Raises:
        ValueError: if the edges of the box are not ordered or outside the
            picture, the score is not a number, or the mask is not such an
            array.

    Example:

    >>> cat = Object((0.25, 0.5, 0.75, 1.0), "cat")
    >>> cat.xyxy((100, 200)), cat.xywh((100, 200))
    ((100.0, 25.0, 200.0, 75.0), (100.0, 25.0, 100.0, 50.0))
    """

    box: tuple[float, float, float, float]
    label: str = ""
    score: float | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        box = tuple(float(edge) for edge in self.box)
        inside = all(-_SLACK <= edge <= 1 + _SLACK for edge in box)
        if not (
            len(box) == 4 and inside and box[0] <= box[2] and box[1] <= box[3]
        ):
            raise ValueError(
                "The box does not fit a picture. Expected: (y1, x1, y2, x2), "
                "shares of the height and width with 0 <= y1 <= y2 <= 1 and 0 "
                f"<= x1 <= x2 <= 1. Received: {box}. Boxes in pixels go to "
                "`Object.from_xyxy` or `Object.from_xywh`."
            )
        box = tuple(min(max(edge, 0.0), 1.0) for edge in box)
        object.__setattr__(self, "box", box)
        if self.score is not None:
            score = float(self.score)
            if not math.isfinite(score):
                raise ValueError(f"A score is a number. Received: {score}.")
            object.__setattr__(self, "score", score)
        if self.mask is not None:
            object.__setattr__(self, "mask", _part(self.mask))

    @classmethod
    def from_xyxy(
        cls, edges: Sequence[float], size: tuple[float, float], **fields: Any
    ) -> "Object":
        """Create an object from the corners of its box, in pixels.

        Args:
            edges: (x1, y1, x2, y2), pixels.
            size: (height, width) of the picture, pixels.
            **fields: `label`, `score` and `mask` of the object.

        Raises:
            ValueError: if the box is not inside the picture.

        Example:

        >>> Object.from_xyxy((50, 10, 100, 40), (100, 200), label="cat")
        Object(box=(0.1, 0.25, 0.4, 0.5), label='cat', score=None)
        """
        x1, y1, x2, y2 = edges
        height, width = size
        if not (height > 0 and width > 0):
            raise ValueError(
                "A picture has a height and a width in pixels. Received: "
                f"size={size}."
            )
        box = (y1 / height, x1 / width, y2 / height, x2 / width)
        return cls(box, **fields)

    @classmethod
    def from_xywh(
        cls, edges: Sequence[float], size: tuple[float, float], **fields: Any
    ) -> "Object":
        """Create an object from a box in COCO's form, in pixels.

        Args:
            edges: (x, y, width, height), x and y of the upper left corner.
            size: (height, width) of the picture, pixels.
            **fields: `label`, `score` and `mask` of the object.
        """
        x, y, width, height = edges
        return cls.from_xyxy((x, y, x + width, y + height), size, **fields)

    @classmethod
    def from_mask(cls, mask: np.ndarray, **fields: Any) -> "Object":
        """Create an object from its mask; its box is that of the mask.

        Args:
            mask: bool array (height, width) of the picture.
            **fields: `label` and `score` of the object.

        Raises:
            ValueError: if the mask is not such an array, or empty.

        Example:

        >>> mask = np.array([[0, 0], [0, 1]], bool)
        >>> Object.from_mask(mask).box
        (0.5, 0.5, 1.0, 1.0)
        """
        y1, x1, y2, x2 = masks.bounds(mask)
        box = cls.from_xyxy((x1, y1, x2, y2), np.shape(mask), **fields)
        return box.with_mask(mask)

    def with_mask(self, mask: np.ndarray) -> "Object":
        """Return a copy with the part of a mask that is inside the box.

        In data sets, boxes may be larger than their masks, or cut them. In the
        model's answers, a mask fills the box before it.

        Args:
            mask: bool array (height, width) of the picture.

        Returns:
            `Object` with the same box.

        Raises:
            ValueError: if the mask is not such an array, or is empty inside
                the box.

        Example:

        >>> cat = Object((0, 0, 1, 0.5), "cat").with_mask(np.eye(4, dtype=bool))
        >>> cat.mask.shape
        (4, 2)
        """
        mask = masks.check_mask(mask)
        y1, x1, y2, x2 = self.pixels(mask.shape)
        # At least one pixel, even if rounding leaves none: at the far edges
        # the last one.
        y1, x1 = min(y1, mask.shape[0] - 1), min(x1, mask.shape[1] - 1)
        part = mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        if not part.any():
            raise ValueError(
                "The mask is empty within its box. Expected: one pixel or "
                f"more. Received: {np.count_nonzero(mask)} pixels in the "
                f"picture, none in {self}."
            )
        return dataclasses.replace(self, mask=part)

    def xyxy(
        self, size: tuple[float, float] = (1, 1)
    ) -> tuple[float, float, float, float]:
        """Return the corners, (x1, y1, x2, y2), in the unit of `size`.

        Args:
            size: (height, width) of the picture, such as in pixels.
        """
        y1, x1, y2, x2 = self.box
        height, width = size
        return x1 * width, y1 * height, x2 * width, y2 * height

    def xywh(
        self, size: tuple[float, float] = (1, 1)
    ) -> tuple[float, float, float, float]:
        """Return corner and sides, (x, y, width, height), as in COCO.

        Args:
            size: (height, width) of the picture, such as in pixels.
        """
        x1, y1, x2, y2 = self.xyxy(size)
        return x1, y1, x2 - x1, y2 - y1

    def pixels(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the box in whole pixels, (y1, x1, y2, x2), ends exclusive.

        Edges are rounded, so a box of whole pixels is restored exactly. (The
        original's RefCOCO metric truncates them instead.)

        Args:
            size: (height, width) of the picture, pixels.
        """
        x1, y1, x2, y2 = self.xyxy(size)
        return round(y1), round(x1), round(y2), round(x2)

    def mask_in(self, size: tuple[int, int]) -> np.ndarray:
        """Return the mask in a picture.

        Args:
            size: (height, width) of the picture, pixels.

        Returns:
            bool array (height, width) of the picture; the original mask, if the
            size is that of the mask given to `from_mask`.

        Raises:
            ValueError: if the object has no mask.

        Example:

        >>> Object((0, 0, 1, 0.5), mask=np.ones((64, 64))).mask_in((1, 2))
        array([[ True, False]])
        """
        if self.mask is None:
            raise ValueError(
                "The object has no mask. Expected: one of an answer to "
                "`segment` that was read with a codec, or of a data set. "
                f"Received: {self}."
            )
        return masks.paste(self.mask, self.pixels(size), size)

    def __eq__(self, other):
        if not isinstance(other, Object):
            return NotImplemented
        fields = ("box", "label", "score")
        if any(getattr(self, name) != getattr(other, name) for name in fields):
            return False
        if self.mask is None or other.mask is None:
            return self.mask is other.mask
        return np.array_equal(self.mask, other.mask)

    def __hash__(self):
        return hash((self.box, self.label, self.score))


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A part of an answer that is not an object.

    Args:
        text: str, the part.
        reason: str, why it was skipped.
    """

    text: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Objects(Sequence):
    """The objects of an answer, and the parts that were skipped.

    It is a sequence of `Object`s. Notebooks display it as the picture with
    the objects drawn on it.

    Args:
        items: `Object`s, in the order of the answer.
        skipped: `Skipped` parts of the answer.
        answer: str, the model's answer.
        image: the picture, as `read_image` takes it; `None` displays nothing.

    Example:

    >>> found = Objects((Object((0, 0, 1, 1), "cat"),))
    >>> [item.label for item in found]
    ['cat']
    """

    items: Sequence[Object] = ()
    skipped: Sequence[Skipped] = ()
    answer: str = ""
    image: Any = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "items", tuple(self.items))
        object.__setattr__(self, "skipped", tuple(self.skipped))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def _repr_png_(self):
        if self.image is None:
            return None
        picture, buffer = drawing.draw_objects(self.image, self), io.BytesIO()
        picture.thumbnail((_SHOWN, _SHOWN))
        picture.save(buffer, "PNG")
        return buffer.getvalue()


def _part(mask):
    mask = np.asarray(mask)
    if mask.ndim != 2 or not (mask.dtype == bool or mask.dtype.kind == "f"):
        raise ValueError(
            "A mask fills its box. Expected: array (height, width), bool or "
            f"floats above 0 in the object. Received: {mask.dtype} "
            f"{mask.shape}."
        )
    mask = mask.copy()
    mask.flags.writeable = False
    return mask
