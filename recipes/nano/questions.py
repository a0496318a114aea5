"""Questions about a scene, their answers, and the objects that they name.

A picture gets several questions, so that the encoder runs only once for all of
them. Their answers then differ only because of the questions.
"""

from typing import NamedTuple

import numpy as np

from keras_paligemma.tasks.mask_codec import MaskCodec
from recipes.nano import scenes

# The most boxes of an answer, and the most labels of a prompt.
MAX_BOXES = 3
MAX_LABELS = 3

# In prompts of several labels, the share of labels that are not in the scene.
ABSENT_LABELS = 0.15


class Question(NamedTuple):
    """A prompt and its answer.

    Args:
        prompt: str.
        response: str.
        mentioned: list of lists of ints, the indices of the scene's objects
            for each label of the prompt. A caption has no labels, so it lists
            one object after another.
    """

    prompt: str
    response: str
    mentioned: list


def mask_codes(sprites):
    """Encode the outline of each sprite at its full size.

    A sprite has the same codes at every size, so that a model only has to
    recognise the sprite.

    Args:
        sprites: dict, from `scenes.load_sprites`.

    Returns:
        Dict of (style, name) to a string of 16 `<seg>` tokens.
    """
    codec = MaskCodec.embedded()
    texts = {}
    for style, pictures in sprites.items():
        for name, picture in pictures.items():
            alpha = np.asarray(picture.getchannel("a"))
            y1, x1, y2, x2 = scenes.alpha_box(alpha, 0, 0)
            mask = alpha[y1:y2, x1:x2] > scenes.ALPHA_THRESHOLD
            codes = codec.encode_mask(mask)
            texts[style, name] = "".join(f"<seg{code:03d}>" for code in codes)
    return texts


def caption(rng, objects, classes, size, codes):
    """Ask for the names of all objects; `None` if a class occurs twice."""
    names = [placed.name for placed in objects]
    if len(set(names)) < len(names) or len(names) > MAX_BOXES:
        return None
    prompt, response = scenes.caption_example(rng, objects, classes, size)
    return Question(prompt, response, [[i] for i in range(len(objects))])


def count(rng, objects, classes, size, codes):
    """Ask how many objects of a class there are, sometimes an absent one."""
    prompt, response = scenes.count_example(rng, objects, classes, size)
    asked = prompt.split()[-1].removesuffix("?")
    return Question(prompt, response, [_numbers(objects, asked)])


def detect(rng, objects, classes, size, codes):
    """Ask for the boxes of one class."""
    return _boxes(rng, objects, [_one(rng, objects)], size, "detect", None)


def detect_several(rng, objects, classes, size, codes):
    """Ask for two or three classes, in any order, some of them absent."""
    present = list(dict.fromkeys(placed.name for placed in objects))
    absent = [name for name in classes if name not in present]
    asked = [
        present.pop(rng.integers(len(present)))
        if present and rng.random() >= ABSENT_LABELS
        else absent[rng.integers(len(absent))]
        for _ in range(rng.integers(2, MAX_LABELS + 1))
    ]
    asked = list(dict.fromkeys(asked))
    return _boxes(rng, objects, asked, size, "detect", None)


def segment(rng, objects, classes, size, codes):
    """Ask for the outline of one class; `None` if it occurs twice."""
    asked = _one(rng, objects)
    if len(_numbers(objects, asked)) > 1:
        return None
    return _boxes(rng, objects, [asked], size, "segment", codes)


def _one(rng, objects):
    return objects[rng.integers(len(objects))].name


def _numbers(objects, name):
    return [i for i, placed in enumerate(objects) if placed.name == name]


def _boxes(rng, objects, asked, size, verb, codes):
    """Answer with boxes in the order of the labels, then left to right."""
    mentioned = [_numbers(objects, name) for name in asked]
    numbers = [i for several in mentioned for i in several]
    if len(numbers) > MAX_BOXES:
        return None
    found = []
    for i in numbers:
        name, box, style, _ = objects[i]
        outline = codes[style, name] if codes else ""
        found.append(f"{scenes.location_tokens(box, size)}{outline} {name}")
    prompt = f"{verb} {' ; '.join(asked)}"
    return Question(prompt, " ; ".join(found), mentioned)


TASKS = {
    "caption": caption,
    "count": count,
    "detect": detect,
    "detect_several": detect_several,
    "segment": segment,
}


def ask(rng, objects, classes, size, codes, shares, number):
    """Ask different questions about one scene.

    Args:
        rng: `numpy.random.Generator`.
        objects: list of `scenes.Placed`.
        classes: sequence of str.
        size: int, edge of the picture in pixels.
        codes: dict, from `mask_codes`.
        shares: dict of names of `TASKS` to their approximate frequencies.
        number: int, number of questions.

    Returns:
        List of `Question`. A question repeats only if the scene has no more.
    """
    names, weights = list(shares), np.array(list(shares.values()), "float64")
    found, tries = {}, 0
    while len(found) < number and tries < 8 * number:
        tries += 1
        task = names[rng.choice(len(names), p=weights / weights.sum())]
        question = TASKS[task](rng, objects, classes, size, codes)
        if question is not None:
            found.setdefault(question.prompt, question)
    # A class with four or more objects can only be counted.
    asked = list(found.values()) or [count(rng, objects, classes, size, codes)]
    return [asked[i % len(asked)] for i in range(number)]
