"""Measure a model on scenes that it was not trained on.

Training draws its scenes from `np.random.default_rng([0, ...])`, and evaluation
from `np.random.default_rng([1, ...])`, so that the two never overlap.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from keras_paligemma.tasks import masks
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import CODES
from keras_paligemma.tasks.mask_codec import MaskCodec
from recipes.nano import lettering
from recipes.nano import questions
from recipes.nano import scenes
from recipes.nano.fetch import HELD_OUT_FONTS
from recipes.nano.fetch import HELD_OUT_STYLES
from recipes.nano.fetch import TRAINED_FONTS
from recipes.nano.fetch import TRAINED_STYLES

# The most tokens of a response: a German caption, with the end token.
MAX_NEW_TOKENS = 28

BATCH_SIZE = 64

# The minimum IoU for a box to count as on an object.
ON_OBJECT = 0.5


class Measure(NamedTuple):
    """A kind of question and its scenes.

    Args:
        words: str, text for the card.
        task: str, a key of `questions.TASKS`, or a key of `scenes.TASKS` where
            the scenes are those of `scenes.sample`.
        fewest: int, minimum objects in a scene, all different; 0 for
            `scenes.sample`.
        most: int, maximum objects in a scene.
    """

    words: str
    task: str
    fewest: int
    most: int


class Group(NamedTuple):
    """What the scenes of a group are made of.

    Args:
        styles: sequence of str.
        words: sequence of str.
        fonts: sequence of str, paths.
    """

    styles: Sequence
    words: Sequence = ()
    fonts: Sequence = ()


def load_groups(cache):
    """Return the trained and the held-out `Group`.

    The words of both are held out.

    Args:
        cache: `pathlib.Path`, the folder of `fetch.py`.
    """
    _, words = lettering.load_words(cache)
    return {
        name: Group(styles, words, lettering.load_fonts(cache, fonts))
        for name, styles, fonts in (
            ("trained", TRAINED_STYLES, TRAINED_FONTS),
            ("held-out", HELD_OUT_STYLES, HELD_OUT_FONTS),
        )
    }


MEASURES = {
    "caption_single": Measure("caption of one object", "caption", 0, 1),
    "caption": Measure("caption of one to three", "caption", 0, 3),
    "detect": Measure("detection, one to three, some twice", "detect", 0, 3),
    "count": Measure("counting, 0 to 5", "count", 0, 5),
    "detect_1": Measure("detection of the only object", "detect", 1, 1),
    "detect_2": Measure("detection of one of two", "detect", 2, 2),
    "detect_3": Measure("detection of one of three", "detect", 3, 3),
    "several": Measure("several labels", "detect_several", 2, 3),
    "segment": Measure("segmentation, one to three", "segment", 1, 3),
    "translate": Measure("caption in de, fr, es or ja", "translate", 1, 3),
    "read": Measure("reading a word or number, up to five", "read", 1, 2),
}
# Names of `score`'s results on the card.
SCORES = {
    "exact": "exact",
    "iou": "mean IoU",
    "right": "right object",
    "labels": "labels in their order",
}
# Measures that every version of the preset supports.
PUBLISHED = ("caption_single", "caption", "detect", "count")


def held_out_scenes(sprites, classes, group, measure, seed, count):
    """Make the scenes of one measure.

    Args:
        sprites: dict, from `variants.with_codes`.
        classes: sequence of str.
        group: `Group`.
        measure: str, key of `MEASURES`.
        seed: int.
        count: int, number of scenes.

    Returns:
        List of examples like those of `scenes.sample`.
    """
    kind = list(MEASURES).index(measure)
    _, task, fewest, most = MEASURES[measure]
    rngs = [np.random.default_rng([1, seed, kind, i]) for i in range(count)]
    if not fewest:
        return [
            scenes.sample(
                rng,
                sprites,
                classes,
                group.styles,
                tasks=(task,),
                max_objects=most,
            )
            for rng in rngs
        ]
    examples = []
    for rng in rngs:
        scene = scenes.Scene(None, [])
        while task == "read" and not scene.letters or not scene.objects:
            number = rng.integers(fewest, most + 1)
            names = scenes.draw(rng, classes, number)
            scene = scenes.compose(rng, sprites, group.styles, names)
            if task == "read":
                scene = lettering.write(rng, scene, group.words, group.fonts)
        question = questions.TASKS[task](rng, scene, classes)
        examples.append(
            {
                "image": scene.image,
                "prompt": question.prompt,
                "response": question.response,
                "objects": scene.objects,
                "task": task,
            }
        )
    return examples


def respond(generate, examples):
    """Generate answers to the examples' prompts in batches."""
    responses = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        inputs = {
            "images": np.stack([example["image"] for example in batch]),
            "prompts": [example["prompt"] for example in batch],
        }
        responses += generate(inputs, max_new_tokens=MAX_NEW_TOKENS)
    return responses


def read_boxes(text, name, size):
    """Return a response's boxes for one class, in pixels."""
    return [
        [size * edge for edge in found.box]
        for found in read_objects(text)
        if found.label == name
    ]


def match_boxes(wanted, found):
    """Pair boxes greedily.

    Args:
        wanted: list of the true boxes.
        found: list of the model's boxes.

    Returns:
        List of the IoU of each true box and the best box that no earlier true
        box took; 0 where none is left.
    """
    left, overlaps = list(found), []
    for box in wanted:
        best = max(
            left, key=lambda other: scenes.overlap(box, other), default=None
        )
        if best is None:
            overlaps.append(0.0)
        else:
            left.remove(best)
            overlaps.append(scenes.overlap(box, best))
    return overlaps


def score(example, response):
    """Return the scores of a response.

    Args:
        example: dict, from `held_out_scenes`.
        response: str.

    Returns:
        Dict of lists. `"exact"` is given for answers without boxes.
        Detection gives `"iou"` with the named objects and `"right"`, whether
        a box is on the named object. Several labels also give `"labels"`,
        whether the answer's labels are the expected ones in order.
        Segmentation gives `"iou"` of masks.
    """
    if example["task"] in ("caption", "count", "translate", "read"):
        return {"exact": [float(response.strip() == example["response"])]}
    if example["task"] == "segment":
        return {"iou": [mask_overlap(example, response)]}
    _, labels = example["prompt"].split(" ", 1)
    size = len(example["image"])
    overlaps = []
    for label in labels.split(" ; "):
        wanted = [p.box for p in example["objects"] if p.name == label]
        overlaps += match_boxes(wanted, read_boxes(response, label, size))
    scores = {
        "iou": overlaps,
        "right": [float(value >= ON_OBJECT) for value in overlaps],
    }
    if example["task"] == "detect_several":
        found, wanted = (
            [box.label for box in read_objects(text)]
            for text in (response, example["response"])
        )
        scores["labels"] = [float(found == wanted)]
    return scores


def mask_overlap(example, response):
    """Return the IoU of the true mask and the answer's mask."""
    asked = example["prompt"].split(" ", 1)[1]
    size = len(example["image"])
    (placed,) = (p for p in example["objects"] if p.name == asked)
    y1, x1, y2, x2 = placed.box
    true = np.zeros((size, size), bool)
    true[y1:y2, x1:x2] = placed.mask
    found = read_mask(response, asked, size)
    return (true & found).sum() / (true | found).sum()


def read_mask(text, name, size):
    """Return the mask of an answer's only object; empty if it has none."""
    boxes = read_boxes(text, name, size)
    codes = [int(code) for code in re.findall(r"<seg(\d{3})>", text)]
    if not boxes or len(codes) != CODES:
        return np.zeros((size, size), bool)
    (part,) = MaskCodec.embedded().decode([codes])
    y1, x1, y2, x2 = (round(edge) for edge in boxes[0])
    return masks.paste(part, (y1, x1, y2, x2), (size, size))


def evaluate(
    generate,
    sprites,
    classes,
    groups,
    seed=0,
    count=256,
    measures=PUBLISHED,
):
    """Measure a model on scenes of a fixed seed.

    Args:
        generate: function of a dict of `"images"`, uint8
            `(batch, 112, 112, 3)`, and `"prompts"`, a list of str, and
            the keyword `max_new_tokens`; returns the responses, a list of
            str.
        sprites: dict, from `variants.with_codes`.
        classes: sequence of str, classes of the scenes' objects.
        groups: dict of names to `Group`, such as `load_groups` gives.
        seed: int; another seed gives other scenes.
        count: int, number of scenes for each measure and group.
        measures: sequence of keys of `MEASURES`.

    Returns:
        Dict that maps each group to a dict of numbers from 0 to 1, such as
        `"detect_2 right"`: a measure and a key of `score`.
    """
    results = {}
    for name, group in groups.items():
        results[name] = {}
        for measure in measures:
            examples = held_out_scenes(
                sprites, classes, group, measure, seed, count
            )
            values = {}
            responses = respond(generate, examples)
            for example, response in zip(examples, responses, strict=True):
                for key, some in score(example, response).items():
                    values.setdefault(key, []).extend(some)
            results[name] |= {
                f"{measure} {key}": float(np.mean(some))
                for key, some in values.items()
            }
    return results
