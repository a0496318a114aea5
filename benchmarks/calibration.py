"""Measure calibration for int4: `python -m benchmarks.calibration`.

The nano preset is rounded to the nearest, and for scenes in the styles that it
was trained on (needs the sprites of `python -m recipes.nano.fetch`). The tables
show the error of each kernel and of its products, as shares of their norms.
They also show how far logits change on other scenes of these styles and of an
unseen style. `--wide` rounds one product of 3b's widths instead and prints the
time. `--whole` writes a random 3b in bfloat16 and calibrates it with `--count`
pictures and random tokens. It prints the time, and memory without mapped files.
"""

import argparse
import math
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from keras import ops

from benchmarks.export import peak_of
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.layers.weight import Weight
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.quantization.rounding import order_and_factor
from keras_paligemma.quantization.rounding import round_for
from keras_paligemma.quantization.storage import QuantizedFormat
from recipes.nano import scenes
from recipes.nano.fetch import HELD_OUT_STYLES
from recipes.nano.fetch import TRAINED_STYLES

NANO = "pali_gemma2_nano_112"


def draw(seed, count, styles):
    """Draw scenes with prompts and responses; two seeds share none."""
    sprites = scenes.load_sprites()
    classes = sorted(sprites[styles[0]])
    found = [
        scenes.sample(
            np.random.default_rng([seed, number]),
            sprites,
            classes,
            styles,
            tasks=("caption", "detect", "count"),
            max_objects=3,
        )
        for number in range(count)
    ]
    return {
        "images": [example["image"] for example in found],
        "prompts": [example["prompt"] for example in found],
        "responses": [example["response"] for example in found],
    }


def logits(model, examples):
    """Return the logits that predict the responses."""
    x, y, weights = model.preprocessor(examples)
    found = ops.convert_to_numpy(model(x))[:, -y.shape[1] - 1 : -1]
    return found[np.asarray(weights) > 0]


def moments(model, examples):
    """Sum x·xᵀ over the inputs of each product of a float model."""
    x, _, _ = model.preprocessor(examples)
    valid = np.asarray(x["padding_mask"])
    sums = {}

    def observe(layer, x):
        x = ops.convert_to_numpy(x)
        x = x.reshape(len(x), -1, math.prod(layer.input_axes))
        images = x.shape[1] - valid.shape[1]
        if images > 0:
            x = x[np.pad(valid, ((0, 0), (images, 0)), constant_values=True)]
        x = x.reshape(-1, x.shape[-1])
        sums[layer.path] = x.T @ x

    for layer in model.backbone._flatten_layers():
        if isinstance(layer, Projection):
            layer.observer = lambda x, layer=layer: observe(layer, x)
    model(x)
    return sums


def nano_products(models, examples):
    """Yield each weight's name, and errors of kernel and products by model."""
    plain = models[None]
    sums = moments(plain, examples)
    weights = {
        name: dequantized(model.backbone.weights_by_name())
        for name, model in models.items()
        if name
    }
    rows = {}
    for layer in plain.backbone._flatten_layers():
        if not isinstance(layer, Projection):
            continue
        name = stable_name(layer.kernel.path)
        number = re.search(r"/blocks/(\d+)/", layer.path)
        kernel = Weight((layer.kernel,)).read()
        size = math.prod(layer.input_axes)
        moment = sums[layer.path]

        def of_products(change, size=size, moment=moment):
            change = change.reshape(size, -1)
            return np.sqrt(np.sum(change * (moment @ change)))

        for which, found in weights.items():
            if found[name].scales:
                layers = [*found[name].read_layers()]
                change = layers[int(number[1]) if number else 0] - kernel
                rows.setdefault(name, {}).setdefault(which, []).append(
                    (
                        np.linalg.norm(change) / np.linalg.norm(kernel),
                        of_products(change) / of_products(kernel),
                    )
                )
    return rows


def nano(count):
    """Print the tables of the nano preset."""
    examples = draw(7, count, TRAINED_STYLES)
    models = {None: PaliGemmaCausalLM.from_preset(NANO, form="unrolled")}
    given = {"form": "unrolled", "quantize": "int4"}
    models["nearest"] = PaliGemmaCausalLM.from_preset(NANO, **given)
    began = time.perf_counter()
    models["examples"] = PaliGemmaCausalLM.from_preset(
        NANO, **given, calibration=examples
    )
    print(f"{count} examples, {time.perf_counter() - began:.1f} s\n")
    print("| weight | kernel | for examples | products | for examples |")
    print("| --- | --- | --- | --- | --- |")
    unseen = draw(101, 128, TRAINED_STYLES)
    rows = nano_products(models, unseen)
    shares = []
    for name, by_model in rows.items():
        nearest, found = (
            np.mean(by_model[which], axis=0)
            for which in ("nearest", "examples")
        )
        shares.append(found / nearest)
        cells = (nearest[0], found[0], nearest[1], found[1])
        cells = " | ".join(f"{100 * cell:.1f} %" for cell in cells)
        print(f"| {name} | {cells} |")
    kernel, products = np.mean(shares, axis=0)
    print(f"\nin the mean {kernel:.2f} × and {products:.2f} ×\n")
    print("| logits | nearest | for examples |")
    print("| --- | --- | --- |")
    for label, tests in (
        ("trained styles", unseen),
        ("held-out style", draw(102, 128, HELD_OUT_STYLES)),
    ):
        wanted = logits(models[None], tests)
        cells = []
        for which in ("nearest", "examples"):
            found = logits(models[which], tests)
            away = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            same = np.mean(found.argmax(-1) == wanted.argmax(-1))
            cells.append(f"{100 * away:.2f} %, {100 * same:.1f} % same best")
        print(f"| {label} | {' | '.join(cells)} |")


def wide(inputs, outputs, rows=4096):
    """Round one normal kernel for correlated inputs, and time it."""
    random = np.random.default_rng(0)
    layout = QuantizedFormat("int4", (inputs, outputs), (0,))
    kernel = random.standard_normal((inputs, outputs), "float32")
    mixed = random.standard_normal((inputs // 4, inputs), "float32")

    def draw_inputs():
        x = random.standard_normal((rows, inputs // 4), "float32") @ mixed
        return x + random.standard_normal(x.shape, "float32")

    x, unseen = draw_inputs(), draw_inputs()
    began = time.perf_counter()
    factored = order_and_factor(x.T @ x)
    between = time.perf_counter()
    parts = round_for(layout, kernel, *factored)
    ended = time.perf_counter()
    errors = []
    for stored, scale in (layout.quantize(kernel), parts):
        found = layout.dequantize(
            ops.convert_to_tensor(stored),
            ops.convert_to_tensor(scale.astype("float32")),
            "float32",
        )
        change = ops.convert_to_numpy(found) - kernel
        errors.append(np.linalg.norm(unseen @ change))
    print(
        f"{inputs} × {outputs}: factored in {between - began:.1f} s, rounded "
        f"in {ended - between:.1f} s, error of unseen products "
        f"{errors[1] / errors[0]:.2f} × the nearest's",
        flush=True,
    )


def write_random(folder):
    """Write a random 3b, 6 GB."""
    keras.utils.set_random_seed(0)
    PaliGemmaBackbone(dtype="bfloat16").save_to_preset(folder)


def anonymous(pid):
    """Return a process's resident bytes without those of mapped files."""
    _, pages, of_files, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def whole(count, size=4, text=16):
    """Calibrate a complete 3b; print seconds and memory."""
    random = np.random.default_rng(0)
    batches = [
        (
            {
                "images": random.normal(size=(size, 224, 224, 3)).astype(
                    "float32"
                ),
                "token_ids": random.integers(5, 10000, (size, text)),
                "padding_mask": np.ones((size, text), bool),
                "response_mask": np.tile(
                    np.arange(text) >= text // 2, (size, 1)
                ),
            },
            random.integers(5, 10000, (size, text // 2)),
            np.ones((size, text // 2), "float32"),
        )
        for _ in range(count // size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        # It runs in its own process, so that its memory is not counted.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_random, args=[folder]
        )
        writer.start()
        writer.join()
        for given in ({}, {"calibration": batches}):
            before = anonymous(os.getpid())
            seconds, peak = peak_of(
                lambda given=given: PaliGemmaBackbone.from_preset(
                    folder, quantize="int4", **given
                ),
                anonymous,
            )
            print(
                f"{'for examples' if given else 'nearest'}: {seconds:.0f} s, "
                f"{(peak - before) / 1e9:.2f} GB at the most",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--whole", action="store_true")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    if arguments.wide:
        for sizes in ((2304, 2048), (2048, 2304), (9216, 2304)):
            wide(*sizes)
    elif arguments.whole:
        whole(arguments.count)
    else:
        nano(arguments.count)
