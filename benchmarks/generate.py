"""Measure an answer: `python -m benchmarks.generate`.

The models have 3b's widths and vocabulary and 4 + 4 layers. This package,
KerasHub and transformers use the same random weights, greedy search and 16
prompt tokens. Each runs in a separate process. Values are medians. "first" is
the time to the first token, and "token" that of each later token. "of the
bandwidth" compares "token" with the least possible time, in which each decoder
weight is read once at the bandwidth measured here. Memory is the peak while
answering, minus the memory of the imported package, as a multiple of the
weights. `same` tells whether the tokens equal those of the first row's package.
× is the ratio to the first row.

`--batches 2 8`, `--size 448` and `--tokens 16` choose the job.
`--quantize int8` and `--dtype bfloat16` add rows of this package. `--compile`
compares the first answer of 27 + 26 narrow layers, minus a warm answer.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import peers

os.environ.setdefault("KERAS_BACKEND", "jax")

PROMPT, REPEATS = 16, 3


def prompts(sizes, batch, image_size):
    """Return pictures (batch, size, size, 3) and prompts (batch, PROMPT)."""
    import numpy as np

    random = np.random.default_rng(0)
    images = random.uniform(-1, 1, (batch, image_size, image_size, 3))
    ids = random.integers(4, sizes["text"]["vocabulary"], (batch, PROMPT))
    return images.astype("float32"), ids.astype("int32")


def write_weights(sizes, image_size, folder):
    """Write the same random weights for each package."""
    import keras

    from keras_paligemma.models.exports import export

    keras.utils.set_random_seed(0)
    backbone = peers.ours(sizes, image_size, form="unrolled")
    # With zeros, all pictures would look the same.
    kernel = backbone.vision_encoder.projector.kernel
    kernel.assign(keras.random.normal(kernel.shape, stddev=0.02))
    for name in ("keras", "keras_hub", "transformers"):
        export(folder / name, name, backbone)


def ours(folder, form, options):
    """Return a function of pictures, prompts and a number of tokens."""
    import numpy as np

    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma import PaliGemmaCausalLM

    backbone = PaliGemmaBackbone.from_preset(
        folder / "keras", form=form, **options
    )
    model = PaliGemmaCausalLM(backbone)

    def answer(images, ids, tokens):
        return model.generate(
            {
                "images": images,
                "token_ids": ids,
                "padding_mask": np.ones(ids.shape, bool),
            },
            max_new_tokens=tokens,
            stop_token_ids=None,
        )

    return answer, sum(weight.value.nbytes for weight in backbone.weights)


def keras_hub(folder, form, options):
    """Return the same function for KerasHub."""
    import keras_hub
    import numpy as np

    backbone = keras_hub.models.PaliGemmaBackbone.from_preset(
        str(folder / "keras_hub")
    )
    model = keras_hub.models.PaliGemmaCausalLM(
        backbone=backbone, preprocessor=None
    )
    model.compile(sampler="greedy")

    def answer(images, ids, tokens):
        padded = np.pad(ids, ((0, 0), (0, tokens)))
        mask = np.broadcast_to(
            np.arange(padded.shape[1]) < ids.shape[1], padded.shape
        )
        inputs = {
            "images": images,
            "token_ids": padded,
            "padding_mask": mask,
            "response_mask": ~mask,
        }
        found = model.generate(inputs, stop_token_ids=None)
        return np.asarray(found["token_ids"])[:, -tokens:]

    return answer, sum(weight.value.nbytes for weight in backbone.weights)


def transformers(folder, form, options):
    """Return the same function for transformers."""
    import numpy as np
    import torch
    import transformers as hf

    torch.set_num_threads(os.cpu_count())
    model = hf.PaliGemmaForConditionalGeneration.from_pretrained(
        folder / "transformers", dtype=torch.float32
    ).eval()

    def answer(images, ids, tokens):
        patch = model.config.vision_config.patch_size
        pictures = np.full((len(ids), (images.shape[1] // patch) ** 2), 0)
        pictures[:] = model.config.image_token_id
        ids = torch.tensor(np.concatenate([pictures, ids], 1)).long()
        found = model.generate(
            input_ids=ids,
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            attention_mask=torch.ones_like(ids),
            token_type_ids=torch.zeros_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return found[:, -tokens:].numpy()

    return answer, sum(weight.nbytes for weight in model.parameters())


PACKAGES = {"ours": ours, "KerasHub": keras_hub, "transformers": transformers}
IMPORTED = {
    "ours": "keras_paligemma.models.causal_lm",
    "KerasHub": "keras_hub",
    "transformers": "transformers.models.paligemma.modeling_paligemma",
}


def timed(function, *arguments):
    """Return seconds of the first call, their later median, and the result."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        found = function(*arguments)
        seconds.append(time.perf_counter() - began)
    return seconds[0], statistics.median(seconds[1:]), found


def measure(arguments):
    """Answer a few times and print the measurements as JSON."""
    sizes = peers.DEEP if arguments.compile else peers.WIDE
    options = json.loads(arguments.options)
    importlib.import_module(IMPORTED[arguments.who])
    before, peak, done = peers.resident(), [0], threading.Event()
    answer, weights = PACKAGES[arguments.who](
        arguments.folder, arguments.form, options
    )
    gc.collect()
    # Return the memory freed after loading to the system.
    ctypes.CDLL(None).malloc_trim(0)

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], peers.resident())

    threading.Thread(target=watch, daemon=True).start()
    rows = []
    for batch in arguments.batches:
        images, ids = prompts(sizes, batch, arguments.size)
        cold, first, _ = timed(answer, images, ids, 1)
        _, whole, tokens = timed(answer, images, ids, arguments.tokens)
        later = (whole - first) / max(arguments.tokens - 1, 1)
        rows.append(
            {
                "batch": batch,
                "compile": cold - first,
                "first": first,
                "token": later,
                "whole": whole,
                "tokens": tokens.tolist(),
            }
        )
    done.set()
    held = peak[0] - before
    print(json.dumps({"rows": rows, "peak": held, "weights": weights}))


def run(who, form, options, folder, arguments):
    """Measure in a fresh process."""
    found = peers.in_new_process(
        "benchmarks.generate",
        *("--who", who, "--form", form, "--options", json.dumps(options)),
        *("--folder", folder, "--size", arguments.size),
        *("--tokens", arguments.tokens),
        *("--batches", *arguments.batches),
        *(["--compile"] if arguments.compile else []),
    )
    return json.loads(found)


def bytes_of_a_token():
    """Count the float32 bytes of the weights that each token reads."""
    text = peers.WIDE["text"]
    D, F, H = text["width"], text["hidden"], text["head"]
    block = 2 * D * H * (text["queries"] + text["keys"]) + 3 * D * F
    return 4 * (text["layers"] * block + text["vocabulary"] * D)


def rows_of(arguments):
    """Return the measured rows: package, form and loading options."""
    rows = [
        (who, "unrolled", {})
        for who in ("KerasHub", "transformers", "ours")
        if who not in arguments.without
    ]
    if arguments.compile:
        return [*rows, ("ours", "scanned", {})]
    rows += [("ours", "unrolled", {"quantize": m}) for m in arguments.quantize]
    rows += [("ours", "unrolled", {"dtype": d}) for d in arguments.dtype]
    return rows


def main(arguments):
    """Print the table."""
    least = bytes_of_a_token() / peers.bytes_a_second()
    print("| | batch | compile s | × | first s | × | token ms | × |", end="")
    print(" whole s | × | of the bandwidth | peak | same |")
    print(f"|{' --- |' * 13}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # In another process: here the random weights would stay in memory.
        peers.in_new_process(
            "benchmarks.generate",
            *("--write", "--folder", folder, "--size", arguments.size),
            *(["--compile"] if arguments.compile else []),
        )
        reference = None
        for who, form, options in rows_of(arguments):
            found = run(who, form, options, folder, arguments)
            reference = reference or found["rows"]
            name = " ".join([who, *options.values()])
            name += " scanned" if form == "scanned" else ""
            for row, base in zip(found["rows"], reference, strict=True):
                print(f"| {name} | {' | '.join(cells(row, base))}", end="")
                print(f" | {100 * least / row['token']:.0f} %", end="")
                print(f" | {found['peak'] / found['weights']:.2f}", end="")
                is_same = row["tokens"] == base["tokens"]
                print(f" | {'yes' if is_same else 'no'} |", flush=True)


def cells(row, base):
    """Return a row's cells: the batch, and each value with its ratio."""
    texts = [str(row["batch"])]
    for key, scale in (
        ("compile", 1),
        ("first", 1),
        ("token", 1000),
        ("whole", 1),
    ):
        texts.append(f"{row[key] * scale:.2f}")
        texts.append(f"{row[key] / base[key]:.2f}")
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--who", choices=PACKAGES)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--form", default="unrolled")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--quantize", nargs="*", default=[])
    parser.add_argument("--dtype", nargs="*", default=[])
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.write:
        write_weights(
            peers.DEEP if given.compile else peers.WIDE,
            given.size,
            given.folder,
        )
        print("written")
    elif given.who:
        measure(given)
    else:
        main(given)
