"""Boxes as location tokens, and boxes on pictures."""

import math
import re
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from keras_paligemma.preprocessing.images import read_image

# `round(x * 1023)` makes the tokens, so dividing by 1023 inverts it exactly:
# 0 and 1 come back as 0 and 1. Readers in the wild divide by 1024, which
# shifts every edge up and left by at most a thousandth of the picture.
LAST_LOCATION = 1023

# Masks follow the four locations in answers to `segment`; a row of more or
# fewer than four is no box.
_BOX = re.compile(
    r"(?<!<loc\d{4}>)"
    + r"<loc(\d{4})>" * 4
    + r"(?!<loc)(?:<seg\d{3}>)*([^;<]*)"
)

# On smaller pictures labels could not be read.
_LEAST_SIDE = 448

# Told apart by most eyes, on light and dark pictures.
_COLOURS = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
)


class Box(NamedTuple):
    """A box and what is in it.

    Args:
        y1: float, upper edge as a share of the picture's height, 0 to 1.
        x1: float, left edge as a share of its width.
        y2: float, lower edge.
        x2: float, right edge.
        label: str.

    Example:

    >>> Box(0.1, 0.2, 0.5, 0.6, "cat").label
    'cat'
    """

    y1: float
    x1: float
    y2: float
    x2: float
    label: str = ""


def encode_box(box: Sequence, size: tuple[float, float] = (1, 1)) -> str:
    """Write a box as the four location tokens that the model reads.

    Args:
        box: `Box`, or numbers (y1, x1, y2, x2), in units of `size`.
        size: (height, width) of the picture in the unit of the box; for a
            box in pixels the picture's size in pixels.

    Returns:
        `"<locYYYY><locXXXX><locYYYY><locXXXX>"`, without the label.

    Raises:
        ValueError: the box is not inside the picture, or upside down.

    Example:

    >>> encode_box((0, 0.25, 0.5, 1))
    '<loc0000><loc0256><loc0512><loc1023>'
    >>> encode_box((0, 56, 56, 224), size=(112, 224))
    '<loc0000><loc0256><loc0512><loc1023>'

    Source: big_vision `pp/proj/paligemma/segmentation.py`.
    """
    shares = [
        float(edge) / float(side)
        for edge, side in zip(box[:4], (*size, *size), strict=False)
    ]
    # Half a bin of rounding error is forgiven.
    slack = 0.5 / LAST_LOCATION
    inside = all(-slack <= share <= 1 + slack for share in shares)
    if not (
        len(shares) == 4
        and inside
        and shares[0] <= shares[2]
        and shares[1] <= shares[3]
    ):
        raise ValueError(
            "The box does not fit the picture. Expected: 0 <= y1 <= y2 <= "
            f"{size[0]} and 0 <= x1 <= x2 <= {size[1]}. Received: (y1, x1, "
            f"y2, x2) = {tuple(box[:4])}. Pass pixels with size=(height, "
            "width), and clip a box that sticks out."
        )
    return "".join(f"<loc{round(s * LAST_LOCATION):04d}>" for s in shares)


def parse_boxes(text: str) -> list[Box]:
    """Read the boxes of an answer, such as `detect cat ; dog` gets.

    A model may write anything, so what is no box is skipped: too few or too
    many locations, a location that does not exist, a box upside down.

    Args:
        text: `"<loc…><loc…><loc…><loc…> label ; …"`; mask tokens between box
            and label are passed over.

    Returns:
        List of `Box`, in the order of the text.

    Example:

    >>> parse_boxes("<loc0000><loc0000><loc1023><loc1023> cat ; nonsense")
    [Box(y1=0.0, x1=0.0, y2=1.0, x2=1.0, label='cat')]
    """
    boxes = []
    for *edges, label in _BOX.findall(text):
        y1, x1, y2, x2 = (int(edge) / LAST_LOCATION for edge in edges)
        if y1 <= y2 <= 1 and x1 <= x2 <= 1:
            boxes.append(Box(y1, x1, y2, x2, label.strip()))
    return boxes


def draw_boxes(image: Any, boxes: Iterable[Box]) -> Image.Image:
    """Draw boxes and their labels on a copy of a picture.

    Args:
        image: any picture, as `preprocessing.images.read_image` takes it and
            the model sees it.
        boxes: of `parse_boxes`. Boxes of one label have one colour.

    Returns:
        `PIL.Image.Image` in RGB; a picture whose longer side is less than
        448 pixels is enlarged by a whole factor.

    Raises:
        ValueError: the picture cannot be read.

    Example:

    >>> cat = Box(0.1, 0.2, 0.5, 0.6, "cat")
    >>> draw_boxes(Image.new("RGB", (112, 112)), [cat]).size
    (448, 448)
    """
    canvas = Image.fromarray(read_image(image))
    scale = math.ceil(_LEAST_SIDE / max(canvas.size))
    if scale > 1:
        canvas = canvas.resize([side * scale for side in canvas.size])
    width, height = canvas.size
    line = max(2, round(max(canvas.size) / 150))
    font = ImageFont.load_default(max(canvas.size) / 28)
    draw = ImageDraw.Draw(canvas)
    colours = {}
    for y1, x1, y2, x2, label in boxes:
        colour = colours.setdefault(
            label, _COLOURS[len(colours) % len(_COLOURS)]
        )
        left, top = x1 * (width - 1), y1 * (height - 1)
        edges = (left, top, x2 * (width - 1), y2 * (height - 1))
        draw.rectangle(edges, outline=colour, width=line)
        if label:
            _draw_label(draw, label, (left, top), width, colour, font)
    return canvas


def _draw_label(draw, label, corner, room, colour, font):
    """Write a label on a patch of its colour, above the box if it fits."""
    left, top = corner
    _, _, text_width, text_height = draw.textbbox((0, 0), label, font)
    pad = text_height // 6
    width, height = text_width + 2 * pad, text_height + 2 * pad
    left = max(0, min(left, room - width))
    top = top - height if top >= height else top
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.text(
        (left + pad, top + pad),
        label,
        fill="black" if is_light else "white",
        font=font,
    )
