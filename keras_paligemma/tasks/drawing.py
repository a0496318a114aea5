"""Draw objects on a picture: masks, boxes, and labels without overlap."""

import math
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFilter
from PIL import ImageFont

from keras_paligemma.preprocessing.images import read_image

# Smaller pictures are enlarged for legible labels: longer side in pixels.
LEAST_SIDE = 448

# Text height as a fraction of the picture's, and two minimums in pixels.
TEXT_SHARE, TEXT_HEIGHT, LEAST_TEXT_HEIGHT = 0.025, 16, 11

# Line width as a fraction of the picture's size; opacity of masks.
LINE_SHARE, MASK_OPACITY = 0.004, 0.45

# Brightness of a patch without attention, as a fraction.
DARKEST = 0.2

# Longer labels are cut before measuring: a model may repeat itself.
_LONGEST_LABEL = 300

# Distinct to most eyes, on light and dark pictures.
COLOURS = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
)


def draw_objects(
    image: Any, objects: Iterable[Any], doubt: float = 0.0
) -> Image.Image:
    """Draw masks, boxes, labels and scores on a copy of a picture.

    Each label has one colour. Labels never overlap and never leave the
    picture: a label whose place is taken is moved, with a line to its box.
    Text shrinks if there is much of it. Labels that still do not fit are left
    out, the lowest scores first; their boxes remain.

    Args:
        image: any picture that `preprocessing.images.read_image` takes.
        objects: `tasks.objects.Object`s.
        doubt: float, boxes of lower scores are dashed.

    Returns:
        `PIL.Image.Image` in RGB; a picture whose longer side is less than
        448 pixels is enlarged by an integer factor.

    Raises:
        ValueError: if the picture cannot be read.

    Example:

    >>> from keras_paligemma.tasks.objects import Object
    >>> cat = Object((0.1, 0.2, 0.5, 0.6), "cat", 0.9)
    >>> draw_objects(Image.new("RGB", (112, 112)), [cat]).size
    (448, 448)
    """
    canvas = _enlarged(image)
    width, height = canvas.size
    line = max(2, round(LINE_SHARE * math.sqrt(width * height)))
    objects = list(objects)
    colours = _colours(objects)
    boxes = [item.pixels((height, width)) for item in objects]
    # Large objects are drawn first, below small ones.
    order = sorted(range(len(objects)), key=lambda i: -_area(boxes[i]))
    for i in order:
        if objects[i].mask is not None:
            mask = objects[i].mask_in((height, width))
            _draw_mask(canvas, mask, boxes[i], colours[i], line)
    pen = ImageDraw.Draw(canvas)
    for i in order:
        score = objects[i].score
        is_doubtful = score is not None and score < doubt
        _draw_box(pen, boxes[i], colours[i], line, is_doubtful)
    _draw_labels(pen, objects, boxes, colours)
    return canvas


def draw_attention(image: Any, shares: np.ndarray) -> Image.Image:
    """Darken a picture where patches have small shares of attention.

    Args:
        image: any picture that `preprocessing.images.read_image` takes.
        shares: float array (rows, columns) of the patches, 0 or more; the
            largest share has the picture's own brightness.

    Returns:
        `PIL.Image.Image` in RGB, of the size that `draw_objects` returns.

    Raises:
        ValueError: if the picture cannot be read.

    Example:

    >>> draw_attention(Image.new("RGB", (448, 448)), np.eye(2)).size
    (448, 448)
    """
    canvas = _enlarged(image)
    largest = max(float(shares.max()), np.finfo("float32").tiny)
    light = Image.fromarray(np.asarray(shares / largest, "float32"))
    light = light.resize(canvas.size, Image.Resampling.BILINEAR)
    light = DARKEST + (1 - DARKEST) * np.asarray(light)[..., None]
    return Image.fromarray(np.rint(np.asarray(canvas) * light).astype("uint8"))


def _enlarged(image):
    """Read a picture, enlarged by an integer factor if it is small."""
    canvas = Image.fromarray(read_image(image))
    scale = math.ceil(LEAST_SIDE / max(canvas.size))
    return canvas.resize([side * scale for side in canvas.size])


def place_labels(
    labels: Sequence[tuple[int, int]],
    boxes: Sequence[tuple[int, int, int, int]],
    size: tuple[int, int],
) -> list[tuple[int, int] | None]:
    """Place labels, each as near to its box as the earlier ones allow.

    Args:
        labels: (height, width) of each, pixels.
        boxes: (y1, x1, y2, x2) of each, pixels.
        size: (height, width) of the picture, pixels.

    Returns:
        The upper left corner (y, x) of each label; `None` if no place is
        left.

    Example:

    >>> place_labels([(10, 20), (10, 20)], [(50, 5, 90, 60)] * 2, (100, 100))
    [(40, 5), (40, 40)]
    """
    taken = np.zeros((0, 4), int)
    places = []
    for (height, width), (y1, x1, y2, x2) in zip(labels, boxes, strict=True):
        room = (size[0] - height, size[1] - width)
        if min(room) < 0:
            places.append(None)
            continue
        rows = (y1 - height, y2, y1, y2 - height)
        near = [(y, x) for y in rows for x in (x1, x2 - width)]
        near += [(y1, x2), (y1, x1 - width)]
        near = np.clip(near, 0, room)
        is_free = _is_free(near, (height, width), taken)
        if not is_free.any():
            grid = np.mgrid[0 : room[0] + 1 : height, 0 : room[1] + 1 : height]
            grid = grid.reshape(2, -1).T
            distance = np.abs(grid - (y1 - height, x1)).sum(1)
            near = grid[np.argsort(distance)]
            is_free = _is_free(near, (height, width), taken)
        if not is_free.any():
            places.append(None)
            continue
        y, x = near[is_free.argmax()].tolist()
        places.append((y, x))
        taken = np.vstack([taken, (y, x, y + height, x + width)])
    return places


def _is_free(corners, size, taken):
    """Return whether a rectangle at each corner is free of those taken."""
    if not len(taken):
        return np.ones(len(corners), bool)
    starts, ends = corners[:, None], corners[:, None] + size
    covers = (starts < taken[:, 2:]) & (ends > taken[:, :2])
    return ~covers.all(-1).any(-1)


def _colours(objects):
    """Return each object's colour, one per label in order of appearance."""
    labels = list(dict.fromkeys(item.label for item in objects))
    return [
        COLOURS[labels.index(item.label) % len(COLOURS)] for item in objects
    ]


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _draw_mask(canvas, mask, box, colour, line):
    """Blend in a mask's colour and draw its outline."""
    y1, x1, y2, x2 = box
    if not mask.any():
        return
    mask = np.pad(mask[y1:y2, x1:x2], line)
    # The blur lowers values within a line's width of the edge: the outline.
    blurred = Image.fromarray(mask * np.uint8(255)).filter(
        ImageFilter.BoxBlur(line)
    )
    inner = slice(line, -line)
    outline = (mask & (np.asarray(blurred) < 255))[inner, inner]
    mask = mask[inner, inner]
    pixels = np.asarray(canvas.crop((x1, y1, x2, y2)), "float32")
    share = np.where(outline, 1.0, MASK_OPACITY * mask)[..., None]
    pixels = pixels * (1 - share) + share * np.array(colour, "float32")
    blended = Image.fromarray(np.rint(pixels).astype("uint8"))
    canvas.paste(blended, (x1, y1))


def _draw_box(pen, box, colour, line, is_doubtful):
    """Draw a box on a darker, wider one, visible on any background."""
    y1, x1, y2, x2 = box
    edges = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    dark = tuple(part // 4 for part in colour)
    pen.rectangle(edges, outline=dark, width=line + max(1, line // 2))
    if not is_doubtful:
        pen.rectangle(edges, outline=colour, width=line)
        return
    dash = 4 * line
    left, top, right, bottom = edges
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash, right)
        pen.rectangle((x, top, end, min(top + line - 1, bottom)), colour)
        pen.rectangle((x, max(bottom - line + 1, top), end, bottom), colour)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash, bottom)
        pen.rectangle((left, y, min(left + line - 1, right), end), colour)
        pen.rectangle((max(right - line + 1, left), y, right, end), colour)


def _draw_labels(pen, objects, boxes, colours):
    """Draw labels and scores, the highest score first, where there is room."""
    width, height = pen.im.size
    words = [_words(item) for item in objects]
    shown = [i for i, both in enumerate(words) if any(both)]
    shown.sort(
        key=lambda i: -(1 if objects[i].score is None else objects[i].score)
    )
    text_height = max(TEXT_HEIGHT, TEXT_SHARE * math.sqrt(width * height))
    while True:
        font: Any = ImageFont.load_default(text_height)
        pad = max(2, round(text_height / 6))
        texts = [_fit(*words[i], font, width - 2 * pad) for i in shown]
        row = sum(font.getmetrics()) + pad
        labels = [
            (row, math.ceil(font.getlength(text)) + 2 * pad) for text in texts
        ]
        is_least = text_height <= LEAST_TEXT_HEIGHT
        if sum(map(math.prod, labels)) <= width * height or is_least:
            places = place_labels(
                labels, [boxes[i] for i in shown], (height, width)
            )
            if None not in places or is_least:
                break
        text_height = max(LEAST_TEXT_HEIGHT, 0.85 * text_height)
    drawn = [
        (i, (*place, place[0] + label[0], place[1] + label[1]), text)
        for i, place, label, text in zip(
            shown, places, labels, texts, strict=True
        )
        if place is not None
    ]
    for i, patch, _ in drawn:
        _draw_line(pen, boxes[i], patch, colours[i], max(1, pad // 2))
    for i, (y1, x1, y2, x2), text in drawn:
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=colours[i])
        ink = _ink(colours[i])
        pen.text((x1 + pad, y1 + pad // 2), text, fill=ink, font=font)


def _draw_line(pen, box, patch, colour, line):
    """Draw a line from a label that does not touch its box to the box."""
    y1, x1, y2, x2 = box
    top, left, bottom, right = patch
    if top <= y2 and bottom >= y1 and left <= x2 and right >= x1:
        return
    start = ((left + right) // 2, (top + bottom) // 2)
    end = (min(max(start[0], x1), x2 - 1), min(max(start[1], y1), y2 - 1))
    pen.line((start, end), fill=colour, width=line)


def _words(item):
    """Return the label, on one line, and the score."""
    label = item.label[:_LONGEST_LABEL].encode("utf-8", "replace").decode()
    score = "" if item.score is None else f"{item.score:.2f}"
    return " ".join(label.split()), score


def _fit(label, score, font, room):
    """Join label and score; shorten a label wider than the picture."""
    text = f"{label} {score}".strip()
    while label and font.getlength(text) > room:
        label = label[:-1]
        text = f"{label}... {score}".strip()
    return text


def _ink(colour):
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return "black" if is_light else "white"
