"""Measure rounding errors: `python -m benchmarks.quantized_format`.

Prints two kinds of tables for int8 and int4. The first shows the error of each
weight, as a share of its Frobenius norm, for the nano preset and for random
weights of 3b's widths. The second shows how far the nano preset's logits and
answers change for the pictures of `examples`.
"""

import argparse
import math
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops
from PIL import Image

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import presets
from keras_paligemma import without_values
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.quantization.storage import QuantizedFormat

MODES = ("int8", "int4")
NANO = "pali_gemma2_nano_112"
PICTURES = Path(__file__).parents[1] / "examples" / "pictures"
PROMPTS = ("caption en", "detect cat", "count cat")


def error(layout, array):
    """Return |w - dequantize(quantize(w))| / |w|, in Frobenius norms."""
    stored, scale = layout.quantize(array)
    found = layout.dequantize(
        ops.convert_to_tensor(stored),
        ops.convert_to_tensor(scale.astype("float32")),
        "float32",
    )
    found = ops.convert_to_numpy(found)
    return np.linalg.norm(found - array) / np.linalg.norm(array)


def layouts(fields, mode):
    """Map the name of each quantized weight to the format of a layer."""
    with without_values():
        backbone = PaliGemmaBackbone(
            **fields | {"form": "unrolled", "quantization": mode}
        )
    return {
        name: weight.quantized_format
        for name, weight in dequantized(backbone.weights_by_name()).items()
        if weight.scales
    }


def nano_errors(mode):
    """Yield each weight's name and the errors of its layers."""
    backbone = PaliGemmaBackbone.from_preset(NANO, form="unrolled")
    weights = backbone.weights_by_name()
    for name, layout in layouts(
        presets.describe(NANO)["backbone"], mode
    ).items():
        arrays = weights[name].read_layers()
        yield name, [error(layout, array) for array in arrays]


def random_errors(mode):
    """Yield each name of 3b, the error of normal weights, and values/s."""
    random = np.random.default_rng(0)
    fields = dict(presets.describe("pali_gemma2_pt_3b_224")["backbone"])
    for name, layout in layouts(fields, mode).items():
        shape = layout.shape
        if shape[0] > 100_000:
            layout = QuantizedFormat(mode, (8192, *shape[1:]), layout.axes)
        array = random.standard_normal(layout.shape, "float32")
        began = time.perf_counter()
        layout.quantize(array)
        seconds = time.perf_counter() - began
        yield name, [error(layout, array)], math.prod(layout.shape) / seconds


def logits_and_answers(model):
    """Return the logits after each prompt, and the answers."""
    pictures = [Image.open(path) for path in sorted(PICTURES.glob("*.png"))]
    inputs = {
        "images": [picture for picture in pictures for _ in PROMPTS],
        "prompts": list(PROMPTS) * len(pictures),
    }
    arrays = model.preprocessor.generate_preprocess(inputs)
    logits = ops.convert_to_numpy(model(arrays))
    last = model.preprocessor.prompt_length - 1
    return logits[:, last], model.generate(inputs, max_new_tokens=16)


def show(rows):
    """Print a table of mean and largest errors by name and mode."""
    print("| weight | int8 mean | int8 max | int4 mean | int4 max |")
    print("| --- | --- | --- | --- | --- |")
    by_mode = [dict(rows(mode)) for mode in MODES]
    for name in by_mode[0]:
        cells = [
            f"{100 * value:.2f} %"
            for errors in by_mode
            for value in (np.mean(errors[name]), np.max(errors[name]))
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main():
    """Print the tables."""
    print(f"\n{NANO}\n")
    show(nano_errors)
    rates = []

    def without_rate(mode):
        for name, errors, rate in random_errors(mode):
            rates.append((mode, rate))
            yield name, errors

    print("\nnormal weights of 3b's widths\n")
    show(without_rate)
    for mode in MODES:
        slowest = min(rate for measured, rate in rates if measured == mode)
        print(f"\n{mode}: at least {slowest / 1e6:.0f} M values/s are rounded")
    print("\n| nano | logits | same best token | same answers |")
    print("| --- | --- | --- | --- |")
    logits, answers = logits_and_answers(PaliGemmaCausalLM.from_preset(NANO))
    for mode in MODES:
        model = PaliGemmaCausalLM.from_preset(NANO, quantize=mode)
        found, said = logits_and_answers(model)
        away = np.linalg.norm(found - logits) / np.linalg.norm(logits)
        same = np.mean(found.argmax(-1) == logits.argmax(-1))
        alike = np.mean([a == b for a, b in zip(answers, said, strict=True)])
        print(
            f"| {mode} | {100 * away:.2f} % | {100 * same:.0f} % | "
            f"{100 * alike:.0f} % |"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    keras.utils.set_random_seed(0)
    main()
