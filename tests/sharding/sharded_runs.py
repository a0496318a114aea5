"""Load, adapt, resume and save a model on eight virtual devices.

Its test runs it with a folder for files. An int8 model with adapters, under a
layout that shards all weights, must give the same results as on one device.
"""

import shutil
import sys
from pathlib import Path

# It sets environment variables, which JAX reads on first use.
from tests.sharding import sharded_training  # isort: skip

import jax
import keras
import numpy as np

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.compat import fill
from keras_paligemma.data import Batches
from keras_paligemma.layers import weight
from keras_paligemma.sharding import distribute
from keras_paligemma.sharding.layouts import chip_bytes
from keras_paligemma.training import fit
from tests.helpers.checks import check
from tests.sharding.sharded_training import RESPONSE
from tests.sharding.sharded_training import TARGETS
from tests.sharding.sharded_training import Losses
from tests.sharding.sharded_training import check_shards
from tests.sharding.sharded_training import tokens

STEPS, BATCH = 4, 8


def preprocess(example):
    """Return an example's arrays of one row, as inputs of the model."""
    ids = example["responses"]
    weights = np.ones(RESPONSE, "float32")
    return tokens(example["images"], ids), ids[-RESPONSE:], weights


def batches(parts=1, index=0):
    """Return a part of the batches; the last one has three examples.

    With two hosts, the first reads all three, and the second only blank rows.
    """
    random = np.random.default_rng(0)
    length = sharded_training.PROMPT + RESPONSE
    return Batches(
        [
            {
                "images": random.uniform(-1, 1, (28, 28, 3)).astype("f4"),
                "prompts": "",
                "responses": random.integers(1, 320, length).astype("int32"),
            }
            for _ in range((STEPS - 1) * BATCH + 3)
        ],
        preprocess,
        BATCH // parts,
        shard=(index, parts),
        drop_remainder=False,
    )


class Watched:
    """Record the most bytes on a device after each weight is placed."""

    def __init__(self):
        self.before = self.on_devices()
        self.most = 0

    def on_devices(self):
        held = {device: {} for device in jax.devices()}
        # Compare addresses: reading a shard gives another array for the same
        # memory.
        for array in jax.live_arrays():
            for shard in array.addressable_shards:
                place = shard.data.unsafe_buffer_pointer()
                held[shard.device][place] = shard.data.nbytes
        return {device: sum(sizes.values()) for device, sizes in held.items()}

    def __call__(self, variable, value):
        fill(variable, value)
        now = self.on_devices()
        grown = max(now[device] - self.before[device] for device in now)
        self.most = max(self.most, grown)


def load(preset, adapter=None):
    """Return an int8 model with adapters, its variables, and the peak bytes."""
    watched = Watched()
    weight.fill = watched
    model = PaliGemmaCausalLM.from_preset(
        preset, quantize="int8", form="scanned", compile=False
    )
    weight.fill = fill
    bare = list(model.variables)
    if adapter is None:
        keras.utils.set_random_seed(0)
        model.enable_lora(2, targets=TARGETS)
    else:
        model.load_adapter(adapter)
    model.compile(Adam(1e-2))
    return model, bare, watched.most


def train(model, folder, parts=1, index=0):
    losses = Losses()
    fit(
        model,
        batches(parts, index),
        folder,
        every=2,
        keep=4,
        callbacks=[losses],
        verbose=0,
    )
    return np.array(losses.values)


def values(model):
    return {
        name: weight.read()
        for name, weight in model.backbone.weights_by_name().items()
        if not name.endswith("adapter_scale")
    }


def assert_same(found, wanted):
    for name, value in found.items():
        np.testing.assert_array_equal(value, wanted[name], name)


def main(folder):
    folder = Path(folder)
    # The step is compiled once; a resumed run reads it from the cache.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # One device: float32 weights, and the losses to compare.
    model = sharded_training.build("scanned", "full")
    model.save_to_preset(folder / "preset")
    model, _, _ = load(folder / "preset")
    wanted = train(model, folder / "one")

    chosen = distribute("both", (4, 2), small=64)
    keras.distribution.set_distribution(chosen)
    # Adapters that are created under a layout follow it, like other variables.
    model, bare, most = load(folder / "preset")
    with check("shards of weights"):
        split = check_shards(model, chosen.layout)
    share = chip_bytes(chosen.layout, bare)
    with check("bytes while loading"):
        # No device ever held more than its share.
        assert most <= 1.02 * share, (most, share)
    whole = sum(variable.value.nbytes for variable in bare)
    with check("bytes of a device"):
        # The largest weight, the patch embedding's kernel, is only split in
        # two.
        assert share < 0.4 * whole, (share, whole)

    losses = train(model, folder / "whole")
    np.save(folder / "losses.npy", losses)
    with check("shards of moments"):
        assert check_shards(model, chosen.layout) > split
    with check("losses"):
        difference = np.abs(losses / wanted - 1).max()
        assert difference <= 1e-5, (losses, wanted)
    trained = values(model)

    # As after a kill following the second step: only its checkpoint remains.
    shutil.copytree(folder / "whole" / "2", folder / "killed" / "2")
    resumed, _, _ = load(folder / "preset")
    again = train(resumed, folder / "killed")
    with check("a killed run's losses"):
        np.testing.assert_array_equal(again, losses[2:])
    with check("a killed run's shards"):
        check_shards(resumed, chosen.layout)
    with check("a killed run's weights"):
        assert_same(values(resumed), trained)

    # Saved from shards and loaded as shards.
    model.save_adapter(folder / "trained")
    model.save_to_preset(folder / "saved")
    with check("a saved preset"):
        saved = PaliGemmaCausalLM.from_preset(folder / "saved", form="scanned")
        saved.optimizer.build(saved.trainable_variables)
        check_shards(saved, chosen.layout)
        assert_same(values(saved), trained)
    with check("a saved adapter"):
        other, _, _ = load(folder / "preset", folder / "trained")
        other.optimizer.build(other.trainable_variables)
        check_shards(other, chosen.layout)
        assert_same(values(other), trained)


if __name__ == "__main__":
    main(sys.argv[1])
