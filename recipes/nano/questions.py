"""Questions about a scene, their answers, and the objects that they name.

A picture gets several questions, so that the encoder runs only once for all of
them. Their answers then differ only because of the questions.
"""

from typing import NamedTuple

import numpy as np

from recipes.nano import languages
from recipes.nano import scenes

# The most boxes of an answer, and the most labels of a prompt.
MAX_BOXES = 3
MAX_LABELS = 3

# In prompts of several labels, the share of labels that are not in the scene.
ABSENT_LABELS = 0.15

# The prompt that asks for a word.
READ = "ocr"


class Question(NamedTuple):
    """A prompt and its answer.

    Args:
        prompt: str.
        response: str.
        mentioned: list of lists of ints, the indices of the scene's objects
            for each label of the prompt. A caption has no labels, so it lists
            one object after another. A word's letters are counted after the
            objects.
    """

    prompt: str
    response: str
    mentioned: list


def caption(rng, scene, classes):
    """Ask for the names of all objects; `None` if a class occurs twice."""
    return _caption(scene, "en")


def translate(rng, scene, classes):
    """Ask for a caption in one of the other languages."""
    choices = languages.TRANSLATED
    return _caption(scene, choices[rng.integers(len(choices))])


def count(rng, scene, classes):
    """Ask how many objects of a class there are, sometimes an absent one."""
    prompt, response = scenes.count_example(
        rng, scene.objects, classes, scene.size
    )
    asked = prompt.split()[-1].removesuffix("?")
    return Question(prompt, response, [_numbers(scene, asked)])


def detect(rng, scene, classes):
    """Ask for the boxes of one class."""
    return _boxes(scene, [_one(rng, scene)], "detect")


def detect_several(rng, scene, classes):
    """Ask for two or three classes, in any order, some of them absent."""
    present = list(dict.fromkeys(placed.name for placed in scene.objects))
    absent = [name for name in classes if name not in present]
    asked = [
        present.pop(rng.integers(len(present)))
        if present and rng.random() >= ABSENT_LABELS
        else absent[rng.integers(len(absent))]
        for _ in range(rng.integers(2, MAX_LABELS + 1))
    ]
    return _boxes(scene, list(dict.fromkeys(asked)), "detect")


def segment(rng, scene, classes):
    """Ask for the outline of one class; `None` if it occurs twice."""
    asked = _one(rng, scene)
    if len(_numbers(scene, asked)) > 1:
        return None
    return _boxes(scene, [asked], "segment")


def read(rng, scene, classes):
    """Ask for the written word; `None` if there is none."""
    if not scene.letters:
        return None
    first = len(scene.objects)
    return Question(
        READ,
        "".join(letter.name for letter in scene.letters),
        [[first + i] for i in range(len(scene.letters))],
    )


def _one(rng, scene):
    return scene.objects[rng.integers(len(scene.objects))].name


def _numbers(scene, name):
    return [i for i, placed in enumerate(scene.objects) if placed.name == name]


def _caption(scene, language):
    names = [placed.name for placed in scene.objects]
    if len(set(names)) < len(names) or len(names) > MAX_BOXES:
        return None
    return Question(
        f"caption {language}",
        languages.caption(names, language),
        [[i] for i in range(len(names))],
    )


def _boxes(scene, asked, verb):
    """Answer with boxes in the order of the labels, then left to right."""
    mentioned = [_numbers(scene, name) for name in asked]
    numbers = [i for several in mentioned for i in several]
    if len(numbers) > MAX_BOXES:
        return None
    found = []
    for i in numbers:
        placed = scene.objects[i]
        outline = placed.codes if verb == "segment" else ""
        location = scenes.location_tokens(placed.box, scene.size)
        found.append(f"{location}{outline} {placed.name}")
    prompt = f"{verb} {' ; '.join(asked)}"
    return Question(prompt, " ; ".join(found), mentioned)


TASKS = {
    "caption": caption,
    "translate": translate,
    "count": count,
    "detect": detect,
    "detect_several": detect_several,
    "segment": segment,
    "read": read,
}


def ask(rng, scene, classes, shares, number):
    """Ask different questions about one scene.

    Args:
        rng: `numpy.random.Generator`.
        scene: `scenes.Scene` with at least one object.
        classes: sequence of str.
        shares: dict of names of `TASKS` to their approximate frequencies.
        number: int, number of questions.

    Returns:
        List of `Question`. A question repeats only if the scene has no more.
    """
    names, weights = list(shares), np.array(list(shares.values()), "float64")
    found, tries = {}, 0
    while len(found) < number and tries < 16 * number:
        # A class with four or more objects can only be counted.
        only_counts = tries >= 8 * number
        tries += 1
        pick = rng.choice(len(names), p=weights / weights.sum())
        task = "count" if only_counts else names[pick]
        question = TASKS[task](rng, scene, classes)
        if question is not None:
            found.setdefault(question.prompt, question)
    asked = list(found.values())
    return [asked[i % len(asked)] for i in range(number)]
