"""Frames of a video, and the mark that WidgetCap's pictures have."""

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image
from PIL import ImageDraw
from PIL import ImageSequence

from keras_paligemma.preprocessing.images import read_image


def pick_frames(video: Any, count: int, stride: int) -> list:
    """Take frames of a video: the first, and every so many behind it.

    Of a video that is too short the frames that it has are repeated from its
    beginning, as the original does.

    Args:
        video: list of frames, array (frames, height, width, 3), path of a
            folder of pictures, whose order is that of their names, or of an
            animated picture (GIF, WebP, APNG).
        count: int.
        stride: int.

    Returns:
        List of `count` pictures.

    Raises:
        ValueError: there is no frame, or the file is a film, which another
            program has to cut into pictures.

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
    """Mark a part of a picture, as WidgetCap's prompts do.

    Args:
        image: as `read_image` takes it.
        box: (y1, x1, y2, x2) as shares of the picture.

    Returns:
        `PIL.Image.Image`, with a line that is a pixel wide once the picture
        is 224 pixels.
    """
    picture = Image.fromarray(read_image(image))
    width, height = picture.size
    y1, x1, y2, x2 = box
    edges = [x1 * width, y1 * height, x2 * width, y2 * height]
    line = max(1, round(max(picture.size) / 224))
    ImageDraw.Draw(picture).rectangle(edges, outline="red", width=line)
    return picture
