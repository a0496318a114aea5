"""Measure loading: `python -m benchmarks.loading`.

Writes a bfloat16 model of 3b's widths and vocabulary with few layers in every
format. Each file is loaded in float32, in a separate process, from a warm page
cache. Memory is the peak minus the memory of the imports, without pages of
mapped files, which the system can reclaim. Time is compared with a plain read:
every array by the format's usual library, cast to float32. KerasHub's own
loader is measured too. Values are medians of three runs, on the JAX backend
unless KERAS_BACKEND names another.

`--sharded` loads on eight virtual JAX devices instead, with kernels and
embedding sharded over all of them. Their memory is the host's, so the limit for
the peak is the same. No device may hold much more than an eighth of the sharded
bytes.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

VISION = {"num_layers": 1}
TEXT = {
    "vocabulary_size": 257_152,
    "num_layers": 2,
    "hidden_dim": 2304,
    "intermediate_dim": 9216,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attention_scalar": 256,
}
FIELDS = {
    "query_pre_attention_scalar": 256,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
}
PATHS = {
    "keras": "keras",
    "transformers": "transformers",
    "big_vision": "big_vision.npz",
    "keras_hub": "keras_hub",
}
RUNS = 3
DEVICES = "--xla_force_host_platform_device_count=8"
# Names of a block; a stack of blocks has names with "_", and a leading axis.
LAYOUT = {
    ".*token_embedding.*table": ("model", None),
    ".*blocks.*attention[/_](query|key|value)[/_]kernel": ("model", None, None),
    ".*blocks.*attention[/_]output[/_]kernel": (None, None, "model"),
    ".*blocks.*mlp[/_](gate|up)[/_]kernel": (None, "model"),
    ".*blocks.*mlp[/_]down[/_]kernel": ("model", None),
    ".*projector.*kernel": (None, "model"),
    ".*patch_embedding.*kernel": (None, None, None, "model"),
}


def make(folder, formats=tuple(PATHS)):
    """Write the model in the given formats, by default all of them."""
    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma.checkpoints import writing
    from keras_paligemma.config import ModelConfig

    backbone = PaliGemmaBackbone(
        224, VISION, TEXT, form="unrolled", dtype="bfloat16"
    )
    config = ModelConfig(backbone=backbone.architecture())
    weights = backbone.weights_by_name()
    for to in formats:
        writing.write(folder / PATHS[to], to, config, weights)


def ours(path):
    """Load by `from_preset`."""
    from keras_paligemma import PaliGemmaBackbone

    fields = FIELDS if path.suffix == ".npz" else {}
    return lambda: PaliGemmaBackbone.from_preset(
        path, dtype="float32", form="unrolled", **fields
    )


def sharded(path, form):
    """Load by `from_preset` on eight devices."""
    import keras

    from keras_paligemma import PaliGemmaBackbone

    mesh = keras.distribution.DeviceMesh((1, 8), ["batch", "model"])
    layout = keras.distribution.LayoutMap(mesh)
    for pattern, axes in LAYOUT.items():
        if "blocks" in pattern and form == "scanned":
            axes = (None, *axes)
        layout[pattern] = axes
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch"
        )
    )
    fields = FIELDS if path.suffix == ".npz" else {}
    return lambda: PaliGemmaBackbone.from_preset(
        path, dtype="float32", form=form, **fields
    )


def held_by_devices(backbone):
    """Return bytes: sharded weights, their peak per device, and the rest."""
    total, rest, devices = 0, 0, {}
    for variable in backbone.variables:
        shards = variable._value.addressable_shards
        if shards[0].data.nbytes == variable._value.nbytes:
            rest += variable._value.nbytes * len(shards)
            continue
        total += variable._value.nbytes
        for shard in shards:
            known = devices.get(shard.device, 0)
            devices[shard.device] = known + shard.data.nbytes
    return {
        "sharded": total,
        "device": max(devices.values()),
        "copied": rest,
    }


def keras_hub(path):
    """Load by KerasHub."""
    import keras_hub

    return lambda: keras_hub.models.PaliGemmaBackbone.from_preset(
        str(path), dtype="float32"
    )


def plain(path):
    """Read every array with the format's usual library and cast it."""
    import h5py
    import ml_dtypes
    import numpy as np
    from safetensors import safe_open

    def read():
        arrays = []
        if path.suffix == ".npz":
            with np.load(path) as file:
                for key in file.files:
                    array = file[key].view(ml_dtypes.bfloat16)
                    arrays.append(array.astype("float32"))
        elif (path / "model.weights.h5").exists():
            with h5py.File(path / "model.weights.h5") as file:

                def visit(name, item):
                    if isinstance(item, h5py.Dataset):
                        # Keras stores bfloat16 as untyped pairs of bytes.
                        array = item[...].view(ml_dtypes.bfloat16)
                        arrays.append(array.astype("float32"))

                file.visititems(visit)
        else:
            for shard in sorted(path.glob("*.safetensors")):
                with safe_open(shard, framework="numpy") as file:
                    for key in file.keys():
                        array = file.get_tensor(key)
                        arrays.append(array.astype("float32"))
        return arrays

    return read


LOADERS = {
    "ours": ours,
    "KerasHub": keras_hub,
    "plain": plain,
    "unrolled": functools.partial(sharded, form="unrolled"),
    "scanned": functools.partial(sharded, form="scanned"),
}


def anonymous():
    """Return the resident bytes of this process without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("RssAnon is not told by this system")


def measure(loader, path):
    """Load once and print seconds and peak bytes."""
    load = LOADERS[loader](path)
    start, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    kept = load()
    if loader != "plain" and os.environ["KERAS_BACKEND"] == "jax":
        import jax

        jax.block_until_ready([variable.value for variable in kept.variables])
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    found = {"seconds": seconds, "peak": peak[0] - start}
    if loader in ("unrolled", "scanned"):
        found |= held_by_devices(kept)
    print(json.dumps(found))


def run(loader, path, runs=RUNS):
    """Run in fresh processes; return medians."""
    results = []
    flags = {}
    if loader in ("unrolled", "scanned"):
        flags = {"XLA_FLAGS": DEVICES, "KERAS_BACKEND": "jax"}
    for _ in range(runs):
        process = subprocess.run(
            [
                sys.executable,
                *("-m", "benchmarks.loading"),
                *("--loader", loader, "--path", path),
            ],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()} | flags,
        )
        results.append(json.loads(process.stdout.splitlines()[-1]))
    return {
        key: statistics.median(result[key] for result in results)
        for key in results[0]
    }


def main(runs):
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder)
        rows = [("big_vision", "ours"), ("transformers", "ours")]
        rows += [("keras", "ours"), ("keras_hub", "ours")]
        rows += [("keras_hub", "KerasHub")]
        weights = parameters() * 4 / 1e9
        largest = TEXT["vocabulary_size"] * TEXT["hidden_dim"] * 4 / 1e9
        print(f"weights {weights:.2f} GB, largest tensor {largest:.2f} GB")
        print("| format | loader | s | × plain read | peak GB | bar GB |")
        print("| --- | --- | --- | --- | --- | --- |")
        bar = 1.1 * weights + largest
        for name, loader in rows:
            path = folder / PATHS[name]
            read = run("plain", path, runs)
            found = run(loader, path, runs)
            print(
                f"| {name} | {loader} | {found['seconds']:.1f} | "
                f"{found['seconds'] / read['seconds']:.2f} | "
                f"{found['peak'] / 1e9:.2f} | {bar:.2f} |"
            )


def main_sharded(runs):
    """Print the table of eight devices."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        formats = ("big_vision", "transformers")
        make(folder, formats)
        weights = parameters() * 4
        largest = TEXT["vocabulary_size"] * TEXT["hidden_dim"] * 4
        print(f"weights {weights / 1e9:.2f} GB")
        print(
            "| format | form | s | peak GB | bar GB | sharded GB | a device |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in formats:
            for form in ("unrolled", "scanned"):
                found = run(form, folder / PATHS[name], runs)
                # Unsharded weights are copied to each device, as the layout
                # specifies.
                placed = found["sharded"] + found["copied"]
                bar = 1.1 * placed + largest
                share = found["device"] / found["sharded"]
                print(
                    f"| {name} | {form} | {found['seconds']:.1f} | "
                    f"{found['peak'] / 1e9:.2f} | {bar / 1e9:.2f} | "
                    f"{found['sharded'] / 1e9:.2f} | {share:.3f} |"
                )


def parameters():
    """Count the model's parameters."""
    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma import without_values

    with without_values():
        return PaliGemmaBackbone(224, VISION, TEXT).count_params()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loader", choices=LOADERS)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    if arguments.loader:
        measure(arguments.loader, arguments.path)
    elif arguments.sharded:
        main_sharded(arguments.runs)
    else:
        main(arguments.runs)
