"""Frames of a video, WidgetCap's red box, and TextVQA's turned pictures."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageSequence

from keras_paligemma.preprocessing.images import read_image


def pick_frames(video: Any, count: int, stride: int) -> list:
    """Sample frames of a video at a fixed stride, starting with the first.

    The frames of a video that is too short are repeated from the beginning, as
    in the original.

    Args:
        video: list of frames; array (frames, height, width, 3); path of a
            folder of pictures, which are sorted by name; or path of an
            animated picture (GIF, WebP, APNG).
        count: int, number of frames.
        stride: int, distance between sampled frames, in frames.

    Returns:
        list of `count` pictures.

    Raises:
        ValueError: there are no frames, or the file is not a picture, such as
            an MP4 film, whose frames have to be extracted first.

    Example:

    >>> pick_frames(["a", "b", "c"], 3, 2)
    ['a', 'c', 'a']
    """
    frames = _frames(video)
    picked = [frames[at] for at in range(0, len(frames), stride)][:count]
    if not picked:
        raise ValueError(f"The video has no frames. Received: {video!r:.80}.")
    return [picked[at % len(picked)] for at in range(count)]


def _frames(video):
    if not isinstance(video, (str, os.PathLike)):
        return list(video)
    if os.path.isdir(video):
        return [
            os.path.join(video, name)
            for name in sorted(os.listdir(video))
            if not name.startswith(".")
        ]
    try:
        with Image.open(video) as opened:
            frames = ImageSequence.Iterator(opened)
            return [frame.convert("RGB") for frame in frames]
    except OSError as error:
        raise ValueError(
            "The video cannot be read as pictures. Expected: a folder of "
            "frames, or an animated picture. Received: "
            f"{os.fspath(video)!r}. Cut it by `ffmpeg -i FILM "
            "FOLDER/%06d.jpg`."
        ) from error


def draw_red_box(image: Any, box: Sequence[float]) -> Image.Image:
    """Mark a region of a picture with a red box, as WidgetCap's task has it.

    Args:
        image: as `read_image` takes it.
        box: floats (y1, x1, y2, x2), relative to the picture's size.

    Returns:
        `PIL.Image.Image`; the line is one pixel wide after resizing to 224
        pixels.
    """
    picture = Image.fromarray(read_image(image))
    width, height = picture.size
    y1, x1, y2, x2 = box
    edges = [x1 * width, y1 * height, x2 * width, y2 * height]
    line = max(1, round(max(picture.size) / 224))
    ImageDraw.Draw(picture).rectangle(edges, outline="red", width=line)
    return picture


def turn(image: Any, quarters: int) -> Image.Image:
    """Turn a picture that lies on its side.

    Args:
        image: as `read_image` takes it.
        quarters: int, quarter turns to the left.

    Returns:
        `PIL.Image.Image`.

    Example:

    >>> turn(np.zeros((4, 6, 3), "uint8"), 1).size
    (4, 6)

    Source: big_vision `datasets/textvqa/textvqa.py`.
    """
    return Image.fromarray(np.rot90(read_image(image), quarters))
