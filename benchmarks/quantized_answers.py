"""Score the quantized nano preset: `python -m benchmarks.quantized_answers`.

Prints the scores of its card for each storage of weights and cache, and their
shares of float32's scores. Needs the sprites of `python -m recipes.nano.fetch`.
With `--calibrated N`, int4 is also calibrated on N scenes of each task. The
last lines are the scores of segmentation with `legal_objects=True`.
"""

import argparse
import functools

from keras_paligemma import PaliGemmaCausalLM
from recipes.nano import evaluate
from recipes.nano import scenes
from recipes.nano import variants
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import DEFAULT_CACHE

NANO = "pali_gemma2_nano_112"
# Columns of the table: name, quantization of the weights, cache dtype.
STORAGES = (
    ("float32", None, None),
    ("int8 cache", None, "int8"),
    ("int8", "int8", None),
    ("int8, int8 cache", "int8", "int8"),
    ("int4", "int4", None),
)


def scores(model, count, measures=tuple(evaluate.MEASURES), **options):
    """Return a dict such as {"caption exact": 0.9}, for trained styles."""
    return evaluate.evaluate(
        functools.partial(model.generate, **options),
        variants.with_codes(scenes.load_sprites()),
        list(CLASSES),
        {"trained": evaluate.load_groups(DEFAULT_CACHE)["trained"]},
        seed=1,
        count=count,
        measures=measures,
    )["trained"]


def calibration(count):
    """Return `count` examples of each task, as `fit` takes them.

    The seed differs from that of `scores`, so no scene is measured.
    """
    measures = "caption detect count several segment translate read".split()
    sprites = variants.with_codes(scenes.load_sprites())
    group = evaluate.load_groups(DEFAULT_CACHE)["trained"]
    examples = [
        example
        for measure in measures
        for example in evaluate.held_out_scenes(
            sprites,
            list(CLASSES),
            group,
            measure,
            seed=2,
            count=count,
        )
    ]
    return {
        "images": [example["image"] for example in examples],
        "prompts": [example["prompt"] for example in examples],
        "responses": [example["response"] for example in examples],
    }


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--calibrated", type=int, default=0)
    options = parser.parse_args()
    columns, legal = {}, {}

    def measure(name, model, cache_dtype=None):
        count = options.count
        columns[name] = scores(model, count, cache_dtype=cache_dtype)
        legal[name] = scores(
            model,
            count,
            ["segment"],
            cache_dtype=cache_dtype,
            legal_objects=True,
        )["segment iou"]
        print(f"{name} is measured", flush=True)

    for name, quantize, cache_dtype in STORAGES:
        model = PaliGemmaCausalLM.from_preset(NANO, quantize=quantize)
        measure(name, model, cache_dtype)
    if options.calibrated:
        model = PaliGemmaCausalLM.from_preset(
            NANO,
            quantize="int4",
            calibration=calibration(options.calibrated),
        )
        measure("int4, calibrated", model)
    print(f"\n| {options.count} scenes each | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    full = columns["float32"]
    for key in full:
        measure, score = key.split()
        words = evaluate.MEASURES[measure].words, evaluate.SCORES[score]
        cells = [
            f"{values[key]:.3f} ({values[key] / full[key]:.1%})"
            for values in columns.values()
        ]
        print(f"| {', '.join(words)} | {' | '.join(cells)} |")
    for name, values in columns.items():
        share = sum(values[key] / full[key] for key in full) / len(full)
        print(f"{name}: {share:.1%} of float32's scores, the mean of the rows")
    for name, value in legal.items():
        print(f"{name}, segmentation of legal objects: mean IoU {value:.3f}")


if __name__ == "__main__":
    main()
