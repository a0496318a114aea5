"""Measures how well a model reads scenes that it was never trained on.

Training draws its scenes from `np.random.default_rng([0, ...])`, evaluation
from `np.random.default_rng([1, ...])`, so the two never meet.
"""

import re

import numpy as np

from presets.nano import scenes

# The most tokens of a response, with the end of the text: a detection of two
# objects has 12.
MAX_NEW_TOKENS = 16

BATCH_SIZE = 64

BOX = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ([^;<]+)")

# Measure -> the task and the most objects of the scenes it is taken on.
MEASURES = {
    "caption_single": ("caption", 1),
    "caption": ("caption", 3),
    "detect_iou": ("detect", 3),
    "count": ("count", 5),
}


def held_out_scenes(sprites, classes, styles, measure, seed, count):
    """Makes the scenes of one measure.

    Args:
        sprites: dict. What `scenes.load_sprites` returns.
        classes: sequence of strings.
        styles: sequence of strings. The styles of one group.
        measure: string. A key of `MEASURES`.
        seed: int.
        count: int. The number of scenes.

    Returns:
        A list of what `scenes.sample` returns.
    """
    task, max_objects = MEASURES[measure]
    kind = list(MEASURES).index(measure)
    return [
        scenes.sample(
            np.random.default_rng([1, seed, kind, index]),
            sprites,
            classes,
            styles,
            tasks=(task,),
            max_objects=max_objects,
        )
        for index in range(count)
    ]


def respond(generate, examples):
    """Lets the model answer the examples' prompts, in batches."""
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
    """Returns the boxes in pixels that a response gives for one class."""
    return [
        [int(value) / (scenes.LOCATIONS - 1) * size for value in values]
        for *values, label in BOX.findall(text)
        if label.strip() == name
    ]


def match_boxes(wanted, found):
    """Pairs boxes greedily.

    Args:
        wanted: list of boxes. The true boxes.
        found: list of boxes. The model's boxes.

    Returns:
        A list with the intersection over union of each true box and the best
        of the boxes that no earlier one took; 0 where none is left.
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
    """Returns the scores of a response: one, or one per box asked for."""
    if example["task"] != "detect":
        return [float(response.strip() == example["response"])]
    asked = example["prompt"].removeprefix("detect ")
    wanted = [box for name, box in example["objects"] if name == asked]
    return match_boxes(
        wanted, read_boxes(response, asked, len(example["image"]))
    )


def evaluate(generate, sprites, classes, style_groups, seed=0, count=256):
    """Measures a model on scenes of a fixed seed.

    Args:
        generate: callable. Takes a dict of `"images"`, uint8
            `(batch, 112, 112, 3)`, and `"prompts"`, a list of strings, and
            the keyword `max_new_tokens`; returns the responses, a list of
            strings.
        sprites: dict. What `scenes.load_sprites` returns.
        classes: sequence of strings. The classes that scenes are made of.
        style_groups: dict. Maps the name of a group to its styles, such as
            `{"trained": TRAINED_STYLES, "held-out": HELD_OUT_STYLES}`.
        seed: int. Another seed gives other scenes.
        count: int. The number of scenes for each measure and group.

    Returns:
        A dict that maps each group to a dict of its measures, each from 0 to
        1: `"caption_single"` and `"caption"`, the share of captions that are
        exactly right for one object and for one to three; `"detect_iou"`, the
        mean intersection over union of the objects asked for; `"count"`, the
        share of right numbers.
    """
    results = {}
    for group, styles in style_groups.items():
        results[group] = {}
        for measure in MEASURES:
            examples = held_out_scenes(
                sprites, classes, styles, measure, seed, count
            )
            responses = respond(generate, examples)
            scores = [
                value
                for example, response in zip(examples, responses, strict=True)
                for value in score(example, response)
            ]
            results[group][measure] = float(np.mean(scores))
    return results
