"""Measure a model on scenes that it was not trained on.

Training draws its scenes from `np.random.default_rng([0, ...])`, and evaluation
from `np.random.default_rng([1, ...])`, so that the two never overlap.
"""

import re
from typing import NamedTuple

import numpy as np

from keras_paligemma.tasks import masks
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import CODES
from keras_paligemma.tasks.mask_codec import MaskCodec
from recipes.nano import questions
from recipes.nano import scenes

# The most tokens of a response: three boxes, with the end token.
MAX_NEW_TOKENS = 24

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


def held_out_scenes(sprites, classes, styles, measure, seed, count):
    """Make the scenes of one measure.

    Args:
        sprites: dict, from `scenes.load_sprites`.
        classes: sequence of str.
        styles: sequence of str, styles of one group.
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
                rng, sprites, classes, styles, tasks=(task,), max_objects=most
            )
            for rng in rngs
        ]
    codes = questions.mask_codes(sprites) if task == "segment" else None
    examples = []
    for rng in rngs:
        number = rng.integers(fewest, most + 1)
        names = scenes.draw(rng, classes, number)
        image, objects = scenes.compose(rng, sprites, styles, names)
        question = questions.TASKS[task](
            rng, objects, classes, len(image), codes
        )
        examples.append(
            {
                "image": image,
                "prompt": question.prompt,
                "response": question.response,
                "objects": objects,
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
    if example["task"] in ("caption", "count"):
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
    """Return the mask of an answer's first object with a name, or `None`."""
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
    style_groups,
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
        sprites: dict, from `scenes.load_sprites`.
        classes: sequence of str, classes of the scenes' objects.
        style_groups: dict of names of groups to their styles, such as
            `{"trained": TRAINED_STYLES, "held-out": HELD_OUT_STYLES}`.
        seed: int; another seed gives other scenes.
        count: int, number of scenes for each measure and group.
        measures: sequence of keys of `MEASURES`.

    Returns:
        Dict that maps each group to a dict of numbers from 0 to 1, such as
        `"detect_2 right"`: a measure and a key of `score`.
    """
    results = {}
    for group, styles in style_groups.items():
        results[group] = {}
        for measure in measures:
            examples = held_out_scenes(
                sprites, classes, styles, measure, seed, count
            )
            values = {}
            responses = respond(generate, examples)
            for example, response in zip(examples, responses, strict=True):
                for name, some in score(example, response).items():
                    values.setdefault(name, []).extend(some)
            results[group] |= {
                f"{measure} {name}": float(np.mean(some))
                for name, some in values.items()
            }
    return results
