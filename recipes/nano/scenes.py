"""Scenes of emoji pictures, with prompts and expected responses.

A scene is a background with one to five sprites on it. All randomness comes
from the `numpy.random.Generator` that the caller passes, so the same seed
gives the same scene. Objects are `Placed`, from left to right. A scene may also
have a written word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from keras_paligemma.tasks.locations import LAST
from keras_paligemma.tasks.locations import to_locations
from recipes.nano import languages
from recipes.nano.fetch import ALPHA_THRESHOLD
from recipes.nano.fetch import DEFAULT_CACHE

# The longer side of an object as a share of the picture's edge.
SINGLE_SCALE = (0.25, 0.7)
SEVERAL_SCALE = (0.2, 0.45)

# Limits of the layout. The distance is between horizontal centres, as a share
# of the picture's edge (11 pixels of 112). It makes "left to right"
# unambiguous.
MAX_OVERLAP = 0.04
MIN_DISTANCE = 11 / 112

# The share of counting questions about a class that is not in the scene.
ABSENT_SHARE = 0.15

# Of detection scenes with several objects, the share with two of one class.
PAIR_SHARE = 0.25

LOCATIONS = LAST + 1

# Changes of a varied picture's colours: turn of the hue in degrees, and factor
# of the saturation. Some have any hue, or none, so that a class is not known by
# the colours that the trained styles share.
HUE_TURN = 25
SATURATION = (0.5, 1.5)
RECOLOURED_SHARE = 0.5
# Change of the ratio of a varied picture's sides.
STRETCH = 0.2


class Placed(NamedTuple):
    """An object of a scene.

    Args:
        name: str, its class.
        box: `(y1, x1, y2, x2)` in whole pixels, the ends exclusive.
        mask: bool array, its visible part within its box.
        codes: str, `<seg>` tokens of its outline.
    """

    name: str
    box: tuple
    mask: np.ndarray | None = None
    codes: str = ""


class Letter(NamedTuple):
    """A letter or digit of a scene's word; its box is like an object's."""

    name: str
    box: tuple


class Scene(NamedTuple):
    """A picture and what it shows.

    Args:
        image: uint8 array `(size, size, 3)`.
        objects: list of `Placed`, from left to right.
        letters: sequence of `Letter`, the written word.
    """

    image: np.ndarray
    objects: list
    letters: Sequence = ()

    @property
    def size(self):
        return len(self.image)


class Sprite(NamedTuple):
    """A picture of a class.

    Args:
        picture: `PIL.Image.Image` cropped to its alpha box, with premultiplied
            colours (mode "RGBa"), as resizing needs them.
        codes: str, `<seg>` tokens of its outline.
    """

    picture: Image.Image
    codes: str = ""


def load_sprites(cache=DEFAULT_CACHE):
    """Read the sprites that `fetch.py` wrote.

    Args:
        cache: `pathlib.Path`, the folder of `sprites.npz`.

    Returns:
        Dict of a style's name to a dict of a class's name to a list with its
        `Sprite`, without codes. A style may lack some classes.
    """
    with np.load(cache / "sprites.npz") as data:
        sprites, sizes = data["sprites"], data["sizes"]
        classes, styles = data["classes"].tolist(), data["styles"].tolist()
    return {
        style: {
            name: [Sprite(premultiplied(sprites[i, j, :height, :width]))]
            for j, name in enumerate(classes)
            for height, width in [sizes[i, j]]
            if height
        }
        for i, style in enumerate(styles)
    }


def premultiplied(pixels):
    """Make a premultiplied `PIL.Image.Image` of a uint8 RGBA array."""
    return Image.fromarray(pixels).convert("RGBa")


def random_colour(rng):
    """Return a float RGB colour that is dark, medium or bright."""
    tint = rng.uniform(-0.35, 0.35, 3)
    return 255 * np.clip(rng.uniform(0, 1) + tint, 0, 1)


def ramp(rng, size, steps):
    """Number all pixels in whole steps along a random direction, from 0."""
    angle = rng.uniform(0, 2 * np.pi)
    line = np.arange(size, dtype="float32")
    values = np.cos(angle) * line + np.sin(angle) * line[:, None]
    low, high = values.min(), values.max()
    return ((values - low) * ((steps - 0.01) / (high - low))).astype("uint8")


def background(rng, size):
    """Draw a plain, graded, cloudy, striped or chequered background.

    Args:
        rng: `numpy.random.Generator`.
        size: int, edge of the picture in pixels.

    Returns:
        A uint8 array `(size, size, 3)`.
    """
    kind = rng.integers(5)
    first, second = random_colour(rng), random_colour(rng)
    if kind == 0:
        return np.full((size, size, 3), first.astype("uint8"))
    if kind == 1:
        # Clouds: a few coarse points, smoothly enlarged.
        points = rng.integers(3, 8)
        shares = rng.uniform(0, 1, (points, points, 1))
        coarse = (first + (second - first) * shares).astype("uint8")
        bicubic = Image.Resampling.BICUBIC
        return np.array(Image.fromarray(coarse).resize((size, size), bicubic))
    if kind == 2:
        steps = ramp(rng, size, 256)
        shares = np.linspace(0, 1, 256)
    else:
        # Stripes, or checks where two sets of stripes cross. Their contrast is
        # reduced, so that objects stand out.
        steps = ramp(rng, size, rng.integers(3, 13))
        if kind == 4:
            steps += ramp(rng, size, rng.integers(3, 13))
        steps %= 2
        shares = np.array([0, rng.uniform(0.1, 0.7)])
    palette = first + (second - first) * shares[:, None]
    return palette.astype("uint8")[steps]


def overlap(first, second):
    """Return the intersection over union of two boxes."""
    height = min(first[2], second[2]) - max(first[0], second[0])
    width = min(first[3], second[3]) - max(first[1], second[1])
    if height <= 0 or width <= 0:
        return 0.0
    common = height * width
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second))
    return common / (areas - common)


def fits(box, boxes, size):
    """Return whether a box keeps clear of the boxes placed before."""
    return all(
        abs(box[1] + box[3] - other[1] - other[3]) >= 2 * MIN_DISTANCE * size
        and overlap(box, other) <= MAX_OVERLAP
        for other in boxes
    )


def layout(rng, shapes, size):
    """Find a place for every object of a scene.

    Args:
        rng: `numpy.random.Generator`.
        shapes: list of `(height, width)`, the sprites' sizes; only their
            ratios matter.
        size: int, edge of the picture in pixels.

    Returns:
        List of boxes, one per shape.
    """
    low, high = SINGLE_SCALE if len(shapes) == 1 else SEVERAL_SCALE
    while True:
        boxes = []
        for shape in shapes:
            edge = rng.uniform(low, high) * size
            height, width = (
                max(1, round(side * edge / max(shape))) for side in shape
            )
            room = (size - height + 1, size - width + 1)
            for y, x in (rng.random((12, 2)) * room).astype(int).tolist():
                box = (y, x, y + height, x + width)
                if fits(box, boxes, size):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(shapes):
            return boxes
        # Too crowded: start again with slightly smaller objects.
        high = low + 0.9 * (high - low)


def paste(rng, image, pixels, y, x):
    """Blend a picture into an image, in place.

    The picture's brightness and contrast are changed slightly.

    Args:
        rng: `numpy.random.Generator`.
        image: uint8 array `(size, size, 3)`.
        pixels: uint8 array `(height, width, 4)`, premultiplied.
        y: int, top row of the picture in the image.
        x: int, left column of the picture in the image.
    """
    height, width, _ = pixels.shape
    region = image[y : y + height, x : x + width]
    contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-20, 20)
    alpha = pixels[..., 3:] * np.float32(1 / 255)
    # The contrast leaves medium grey unchanged.
    shift = 128 * (1 - contrast) + brightness
    colours = contrast * pixels[..., :3] + shift * alpha
    blend = region * (1 - alpha) + colours
    region[:] = np.clip(blend + 0.5, 0, 255)


def alpha_box(alpha, y, x):
    """Return the box of a picture's visible part if it is put at `(y, x)`."""
    seen = alpha > ALPHA_THRESHOLD
    rows = np.flatnonzero(seen.any(axis=1)).tolist()
    columns = np.flatnonzero(seen.any(axis=0)).tolist()
    return (y + rows[0], x + columns[0], y + rows[-1] + 1, x + columns[-1] + 1)


def other_colours(rng, pixels):
    """Turn the hue and scale the saturation of a premultiplied picture.

    Both are linear, so they apply to premultiplied colours directly. Results
    are clipped to alpha.
    """
    recoloured = rng.random() < RECOLOURED_SHARE
    hue = 180 if recoloured else HUE_TURN
    angle = np.deg2rad(rng.uniform(-hue, hue))
    low, high = SATURATION
    factor = rng.uniform(0 if recoloured else low, high)
    third, root = 1 / 3, 1 / np.sqrt(3)
    axis = np.array([[0, -root, root], [root, 0, -root], [-root, root, 0]])
    turn = (
        np.cos(angle) * (np.eye(3) - third) + np.sin(angle) * axis
    ) * factor + third
    colours = pixels[..., :3] @ turn.T.astype("float32")
    changed = np.clip(colours, 0, pixels[..., 3:])
    return np.concatenate([changed, pixels[..., 3:]], axis=-1)


def compose(rng, sprites, styles, names, size=112, varied=False):
    """Draw a scene.

    Args:
        rng: `numpy.random.Generator`.
        sprites: dict, from `load_sprites` or `variants.all_variants`.
        styles: sequence of str; every object gets one of these styles.
        names: list of str, class of each object.
        size: int, edge of the picture in pixels.
        varied: bool, whether pictures are any variant, in other colours and
            with another ratio of their sides.

    Returns:
        `Scene`.
    """
    image = background(rng, size)
    chosen = []
    for name in names:
        having = [style for style in styles if name in sprites[style]]
        some = sprites[having[rng.integers(len(having))]][name]
        # The first variant is the plain sprite.
        chosen.append(some[rng.integers(len(some))] if varied else some[0])
    shapes = []
    for sprite in chosen:
        stretch = np.exp(rng.uniform(-STRETCH, STRETCH)) if varied else 1
        shapes.append((sprite.picture.height * stretch, sprite.picture.width))
    boxes = layout(rng, shapes, size)
    objects = []
    for name, (picture, codes), (y1, x1, y2, x2) in zip(
        names, chosen, boxes, strict=True
    ):
        resized = picture.resize(
            (x2 - x1, y2 - y1), Image.Resampling.BILINEAR, reducing_gap=2.0
        )
        pixels = np.asarray(resized)
        alpha = pixels[..., 3]
        if varied:
            pixels = other_colours(rng, pixels)
        paste(rng, image, pixels, y1, x1)
        top, left, bottom, right = box = alpha_box(alpha, y1, x1)
        mask = alpha[top - y1 : bottom - y1, left - x1 : right - x1]
        objects.append(Placed(name, box, mask > ALPHA_THRESHOLD, codes))
    objects.sort(key=lambda placed: placed.box[1] + placed.box[3])
    return Scene(image, objects)


def choose_names(task, rng, classes, max_objects):
    """Choose the classes of a scene's objects for a task.

    Args:
        task: str, key of `TASKS`.
        rng: `numpy.random.Generator`.
        classes: sequence of str.
        max_objects: int, maximum objects in a scene. Captions and detections
            have at most three.

    Returns:
        List of class names, one per object.
    """
    if task == "count":
        # One class repeats, and the other objects have other classes.
        repeats = rng.integers(1, max_objects + 1)
        others = rng.integers(max_objects - repeats + 1)
        repeated, *names = draw(rng, classes, 1 + others)
        return [repeated] * repeats + names
    names = draw(rng, classes, rng.integers(1, min(max_objects, 3) + 1))
    if task == "detect" and len(names) > 1 and rng.random() < PAIR_SHARE:
        names[1] = names[0]
    return names


def draw(rng, classes, count):
    """Draw distinct classes, as a list."""
    picks = rng.choice(len(classes), count, replace=False)
    return [classes[pick] for pick in picks]


def location_tokens(box, size):
    """Write a box as four location tokens, in the order y1 x1 y2 x2."""
    values = to_locations(np.clip(np.divide(box, size), 0, 1)).tolist()
    return "".join(f"<loc{value:04d}>" for value in values)


def caption_example(rng, objects, classes, size):
    """Ask for the objects from left to right."""
    names = [placed.name for placed in objects]
    return "caption en", languages.caption(names, "en")


def detect_example(rng, objects, classes, size):
    """Ask for the boxes of a class in the scene."""
    asked = objects[rng.integers(len(objects))].name
    found = [
        f"{location_tokens(placed.box, size)} {asked}"
        for placed in objects
        if placed.name == asked
    ]
    return f"detect {asked}", " ; ".join(found)


def count_example(rng, objects, classes, size):
    """Ask how often a class occurs, sometimes an absent one."""
    present = [placed.name for placed in objects]
    if rng.random() < ABSENT_SHARE:
        absent = [name for name in classes if name not in present]
        asked = absent[rng.integers(len(absent))]
    else:
        asked = present[rng.integers(len(present))]
    return f"answer en how many {asked}?", str(present.count(asked))


TASKS = {
    "caption": caption_example,
    "detect": detect_example,
    "count": count_example,
}


def sample(
    rng,
    sprites,
    classes,
    styles,
    tasks=("caption", "detect", "count"),
    max_objects=5,
    size=112,
):
    """Make one training example.

    Args:
        rng: `numpy.random.Generator`.
        sprites: dict, from `load_sprites`.
        classes: sequence of str, classes to draw from.
        styles: sequence of str, styles to draw from.
        tasks: sequence of str, keys of `TASKS` to draw from; a repeated key
            is drawn more often.
        max_objects: int, maximum objects in the scene, at most five.
        size: int, edge of the picture in pixels.

    Returns:
        Dict with `"image"`, `"prompt"`, `"response"`, `"objects"` and
        `"task"`.
    """
    task = tasks[rng.integers(len(tasks))]
    names = choose_names(task, rng, classes, max_objects)
    image, objects, _ = compose(rng, sprites, styles, names, size)
    prompt, response = TASKS[task](rng, objects, classes, size)
    return {
        "image": image,
        "prompt": prompt,
        "response": response,
        "objects": objects,
        "task": task,
    }
