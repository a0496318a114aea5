"""Words in pictures, for the task `ocr`.

A text is a word of two to five letters from the emoji labels, random letters or
a number. It is written in one of several fonts beside the
objects of a scene, sometimes on a plate.
"""

import functools
import string

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from recipes.nano import scenes
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import DEFAULT_CACHE

CHARACTERS = string.ascii_lowercase + string.digits
LONGEST = 5

# Shares of numbers and of random letters; the rest are words. Random letters
# keep a model from guessing a word by its beginning.
NUMBER_SHARE, RANDOM_SHARE = 0.25, 0.25

# Sizes of fonts in pixels of a picture of 112.
SIZES = (24, 48)

# Every tenth word is left for evaluation.
HELD_OUT_EVERY = 10

# Minimum difference between the greys of a word and what it is written on.
CONTRAST = 80
PLATE_SHARE = 0.4
TRIES = 12


def load_words(cache=DEFAULT_CACHE):
    """Return the words for training and those for evaluation.

    Names of classes are for training, as captions have them.
    """
    words = (cache / "words.txt").read_text().split()
    held_out = [w for w in words if w not in CLASSES][::HELD_OUT_EVERY]
    return [word for word in words if word not in held_out], held_out


def load_fonts(cache, names):
    """Return the paths of fonts that `fetch.py` wrote, as a list of str."""
    return [str(cache / "fonts" / f"{name}.ttf") for name in names]


@functools.cache
def font_of(path, size):
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw_text(rng, words):
    """Draw a word, random letters or a number."""
    kind = rng.random()
    length = rng.integers(1, LONGEST + 1)
    if kind < NUMBER_SHARE:
        return "".join(map(str, rng.integers(10, size=length)))
    if kind < NUMBER_SHARE + RANDOM_SHARE:
        picks = rng.integers(26, size=max(length, 2))
        return "".join(string.ascii_lowercase[pick] for pick in picks)
    return words[rng.integers(len(words))]


def grey(colours):
    return np.asarray(colours, "float32") @ [0.3, 0.6, 0.1]


def write(rng, scene, words, fonts):
    """Write a word where a scene has room for it.

    Args:
        rng: `numpy.random.Generator`.
        scene: `scenes.Scene`; its picture is changed.
        words: list of str, to draw words from.
        fonts: list of str, paths.

    Returns:
        `Scene` with the word's letters, or the same scene if there was no room.
    """
    text, size = draw_text(rng, words), scene.size
    path = fonts[rng.integers(len(fonts))]
    low, high = SIZES
    for _ in range(TRIES):
        font = font_of(path, int(rng.integers(low, high + 1)))
        left, top, right, bottom = font.getbbox(text)
        height, width = bottom - top + 4, right - left + 4
        high = max(low, high - 3)
        if width > size or height > size:
            continue
        y = int(rng.integers(size - height + 1))
        x = int(rng.integers(size - width + 1))
        plate = (y, x, y + height, x + width)
        shown = [*scene.objects, *scene.letters]
        if any(scenes.overlap(plate, other.box) > 0 for other in shown):
            continue
        paint(rng, scene.image, text, font, plate, (x + 2 - left, y + 2 - top))
        ends = [font.getlength(text[:i]) for i in range(len(text) + 1)]
        start = x + 2 - left
        letters = [
            scenes.Letter(
                name, (y, start + ends[i], y + height, start + ends[i + 1])
            )
            for i, name in enumerate(text)
        ]
        return scene._replace(letters=[*scene.letters, *letters])
    return scene


def paint(rng, image, text, font, plate, origin):
    """Paint a word in a colour that stands out, in place."""
    y1, x1, y2, x2 = plate
    region = image[y1:y2, x1:x2]
    spread = grey(region).std()
    if spread > CONTRAST / 4 or rng.random() < PLATE_SHARE:
        region[:] = scenes.random_colour(rng)
    below = grey(region).mean()
    while True:
        colour = scenes.random_colour(rng)
        if abs(grey(colour) - below) >= CONTRAST:
            break
    picture = Image.fromarray(image)
    ImageDraw.Draw(picture).text(
        origin, text, tuple(int(c) for c in colour), font=font
    )
    image[:] = np.asarray(picture)
