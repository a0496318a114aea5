"""Measure a step of LoRA: `python -m benchmarks.finetune`.

The models have 3b's widths and vocabulary and 4 + 4 layers, in float32. The
batch is 2, with 16 prompt and 48 response tokens, and LoRA has rank 8 on query
and value. This package, KerasHub and transformers with PEFT each run in a
separate process. Times are medians of the steps after the first. Memory is the
peak during these steps, with weights, minus the memory after the imports.
Drawing random weights needs more memory, which is not counted and is returned
to the system first. `--size 448` uses larger pictures. `--compile` compares the
first step of 27 + 26 narrow layers, minus a warm step.

"towers" says where the adapters are. They are in both towers, as with
KerasHub's `enable_lora` and PEFT's usual targets, or only in the decoder. The
latter is this package's default, and needs no backward pass through the vision
tower. XLA:CPU undoes remat of unrolled blocks, so remat is measured with
stacked blocks.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import threading
import time

from benchmarks import peers

os.environ.setdefault("KERAS_BACKEND", "jax")

BATCH, PROMPT, RESPONSE, RANK = 2, 16, 48, 8
STEPS = 3


def arrays(sizes, image_size):
    """Make one batch: pictures, ids and masks, targets and their weights."""
    import numpy as np

    random = np.random.default_rng(0)
    T = PROMPT + RESPONSE
    ids = random.integers(4, sizes["text"]["vocabulary"], (BATCH, T + 1))
    x = {
        "images": random.uniform(-1, 1, (BATCH, image_size, image_size, 3)),
        "token_ids": ids[:, :T].astype("int32"),
        "padding_mask": np.ones((BATCH, T), bool),
        "response_mask": np.tile(np.arange(T) >= PROMPT, (BATCH, 1)),
    }
    x["images"] = x["images"].astype("float32")
    return x, ids[:, 1:].astype("int32")


def ours(sizes, image_size, towers, form, remat):
    """Return a function that trains one step of this package's model."""
    import numpy as np

    from keras_paligemma import PaliGemmaCausalLM

    backbone = peers.ours(
        sizes, image_size, form=form, remat=None if remat == "none" else remat
    )
    model = PaliGemmaCausalLM(backbone)
    targets = ["query", "value"]
    if towers == "both":
        targets += ["vision.query", "vision.value"]
    backbone.enable_lora(RANK, targets=targets)
    model.compile("adam")
    x, y = arrays(sizes, image_size)
    # Only the response's targets, as the preprocessor gives them.
    y = y[:, PROMPT - 1 : -1]
    return lambda: model.train_on_batch(x, y, np.ones(y.shape, "float32"))


def keras_hub(sizes, image_size, towers, form, remat):
    """Return the same function for KerasHub."""
    import keras
    import keras_hub

    backbone = peers.keras_hub(sizes, image_size)
    backbone.enable_lora(RANK)
    model = keras_hub.models.PaliGemmaCausalLM(
        backbone=backbone, preprocessor=None
    )
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    x, y = arrays(sizes, image_size)
    weights = x["response_mask"].astype("float32")
    return lambda: model.train_on_batch(x, y, weights)


def transformers(sizes, image_size, towers, form, remat):
    """Return the same function for transformers with PEFT, in eager mode."""
    import peft
    import torch

    model = peers.transformers(sizes, image_size)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    if towers == "both":
        targets = ["q_proj", "v_proj"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    model = peft.get_peft_model(model, lora)
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]
    optimizer = torch.optim.Adam(trained, 2e-5)
    x, y = arrays(sizes, image_size)
    images = (image_size // sizes["patch"]) ** 2
    ids = torch.tensor(x["token_ids"]).long()
    picture = torch.full((BATCH, images), 3)
    response = torch.tensor(x["response_mask"]).long()
    labels = torch.where(response.bool(), ids, -100)
    inputs = {
        "pixel_values": torch.tensor(x["images"]).permute(0, 3, 1, 2),
        "input_ids": torch.cat([picture, ids], 1),
        "attention_mask": torch.ones((BATCH, images + ids.shape[1])),
        "token_type_ids": torch.cat([torch.zeros_like(picture), response], 1),
        "labels": torch.cat([torch.full_like(picture, -100), labels], 1),
    }

    def step():
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


STEP_OF = {"ours": ours, "KerasHub": keras_hub, "transformers": transformers}


def measure(arguments):
    """Train a few steps, and print seconds and peak bytes."""
    sizes = peers.DEEP if arguments.compile else peers.WIDE
    if arguments.who == "transformers":
        import peft  # noqa: F401
    else:
        import keras_hub  # noqa: F401
    start, peak, done = peers.resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], peers.resident())

    step = STEP_OF[arguments.who](
        sizes,
        arguments.size,
        arguments.towers,
        arguments.form,
        arguments.remat,
    )
    gc.collect()
    # Return the memory freed after drawing weights to the system.
    ctypes.CDLL(None).malloc_trim(0)
    threading.Thread(target=watch, daemon=True).start()
    seconds = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    done.set()
    warm = statistics.median(seconds[1:])
    result = {"step": warm, "compile": seconds[0] - warm}
    print(json.dumps(result | {"peak": peak[0] - start}))


def run(who, towers, form, remat, arguments):
    """Measure in a fresh process."""
    found = peers.in_new_process(
        "benchmarks.finetune",
        *("--who", who, "--towers", towers, "--form", form),
        *("--remat", remat, "--size", arguments.size),
        *(["--compile"] if arguments.compile else []),
    )
    return json.loads(found)


def bound(image_size, towers):
    """Count the multiplications of a step, forward and backward.

    A frozen product that a gradient passes through is computed twice: forward,
    and for the gradient of its input. Its weight has no gradient. Adapters are
    too small to count.
    """
    vision, text = peers.WIDE["vision"], peers.WIDE["text"]
    patches = (image_size // peers.WIDE["patch"]) ** 2
    tokens = patches + PROMPT + RESPONSE
    D, F = vision["width"], vision["hidden"]
    encoder = patches * vision["layers"] * (
        4 * D * D + 2 * D * F + 2 * patches * D
    ) + patches * (3 * peers.WIDE["patch"] ** 2 * D + D * text["width"])
    D, F, H = text["width"], text["hidden"], text["head"]
    decoder = (
        tokens
        * text["layers"]
        * (
            2 * D * H * (text["queries"] + text["keys"])
            + 3 * D * F
            + 2 * tokens * text["queries"] * H
        )
    )
    head = RESPONSE * D * text["vocabulary"]
    passes = 2 if towers == "both" else 1
    return BATCH * (passes * encoder + 2 * decoder + 2 * head)


def main(arguments):
    """Print the table."""
    rows = [
        ("KerasHub", "both", "unrolled", "none"),
        ("transformers", "both", "unrolled", "none"),
        ("ours", "both", "unrolled", "none"),
        ("ours", "both", "scanned", "block"),
        ("ours", "decoder", "unrolled", "none"),
        ("ours", "decoder", "scanned", "block"),
    ]
    if arguments.compile:
        rows = [rows[0], *rows[2:4]]
    rows = [row for row in rows if row[0] not in arguments.without]
    rate = peers.multiplications_a_second()
    heads = "| | towers | form | remat | step s | × | peak GB | × | compile s |"
    print(f"{heads} × |")
    print(f"|{' --- |' * 10}")
    first = None
    for row in rows:
        found = run(*row, arguments)
        first = first or found
        cells = list(row)
        for key, scale in (("step", 1), ("peak", 1e9), ("compile", 1)):
            cells.append(f"{found[key] / scale:.2f}")
            cells.append(f"{found[key] / first[key]:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        if row[0] == "ours" and not arguments.compile:
            least = bound(arguments.size, row[1]) / rate
            share = 100 * least / found["step"]
            print(f"(the arithmetic alone: {least:.2f} s, {share:.0f} %)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--who", choices=STEP_OF)
    parser.add_argument("--towers", default="both")
    parser.add_argument("--form", default="unrolled")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--without", nargs="*", default=[])
    given = parser.parse_args()
    if given.who:
        measure(given)
    else:
        main(given)
