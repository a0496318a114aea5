"""Loading and saving a backbone's adapters as PEFT's files."""

import dataclasses
import warnings

import numpy as np
from keras import ops

from keras_paligemma.checkpoints import peft
from keras_paligemma.checkpoints import peft_write
from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.compat import process
from keras_paligemma.compat import to_host
from keras_paligemma.compat import wait_for_all
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.tuning.merging import with_adapter

# DoRA's files hold a magnitude for each output: the norm that kernel plus
# adapter are scaled to. A gain is this magnitude relative to their own norm.
MAGNITUDE, GAIN = "adapter_magnitude", "adapter_gain"


def load(backbone, folder, name, allow_nonfinite=False):
    """Add adapters from a folder; see `PaliGemmaBackbone.load_adapter`."""
    adapters = backbone.adapters
    weights = dequantized(adapters.base_weights())
    # Checked before anything is added, so that an error changes nothing.
    lora, pieces, whole = peft.read(
        folder, backbone.architecture(), weights, allow_nonfinite
    )
    if adapters.capacity is not None:
        # Dropout is an option of training, not a property of the values.
        dropout = adapters.capacity.dropout
        lora = dataclasses.replace(lora, dropout=dropout)
    if lora.dora:
        for place, scales, lengths in _lengths(lora, pieces, weights):
            magnitude = pieces.pop(f"{place}/{MAGNITUDE}")
            gain = np.ones_like(lengths)
            np.divide(magnitude, lengths, out=gain, where=lengths > 0)
            pieces[f"{place}/{GAIN}"] = np.divide(
                gain - 1, scales, out=np.zeros_like(gain), where=scales != 0
            )
    adapters.add(name, lora, pieces, whole)


def save(backbone, folder, name=None, base=None):
    """Write one adapter; see `PaliGemmaBackbone.save_adapter`."""
    adapters = backbone.adapters
    name = name or adapters.loaded
    if name not in adapters.configs:
        raise ValueError(
            f"There is no such adapter to write. Received: {name!r}. Expected "
            f"one of {list(adapters.configs)}; `enable_lora` or `load_adapter` "
            "make one, `save_to_preset` writes the whole model."
        )
    lora = adapters.configs[name]
    pieces, whole = adapters.values(name), adapters.whole(name)
    _warn_of_others(backbone, whole)
    if lora.dora:
        if adapters.merged is not None:
            raise ValueError(
                "DoRA's file holds lengths of the base's kernels, and those "
                f"hold the adapter {adapters.merged!r} now. Call "
                "`adapters.unmerge()` first."
            )
        weights = dequantized(adapters.base_weights())
        for place, scales, lengths in _lengths(lora, pieces, weights):
            gain = pieces.pop(f"{place}/{GAIN}")
            pieces[f"{place}/{MAGNITUDE}"] = lengths * (1 + scales * gain)
    architecture = backbone.architecture()
    # Gathered by all processes, written by the first.
    if process()[0] == 0:
        layers = {
            name: adapters.variables.num_layers(name) for name in lora.targets
        }
        peft_write.write(
            folder,
            peft_write.describe(lora, whole, layers, architecture, base),
            peft_write.arrays(lora, pieces, whole, architecture),
        )
    wait_for_all("an adapter is written")


def _warn_of_others(backbone, whole):
    """Warn of trained weights that an adapter's file does not hold."""
    names = {stable_name(v.path) for v in backbone.trainable_variables}
    others = sorted(
        name for name in names - set(whole) if "/adapter_" not in name
    )
    if others:
        warnings.warn(
            "Weights beside the adapter are trainable, and its file does not "
            "hold them. Expected: `save_to_preset`, which writes the whole "
            "model, or frozen weights. Received: "
            f"{', '.join(others[:3])}, {len(others)} in all.",
            stacklevel=4,
        )


def _lengths(lora, pieces, weights):
    """Yield the norm of each output's weights, kernel plus scale · A · B.

    Yields:
        The path of a target, its scales and its norms: arrays of the same
        rank, layer axis first in the blocks.
    """
    for target in lora.targets:
        place = TARGETS[target]
        a, b = pieces[f"{place}/adapter_a"], pieces[f"{place}/adapter_b"]
        if BLOCKS not in place:
            a, b = a[None], b[None]
        kernels = weights[f"{place}/kernel"].layers()
        scales = lora.scales(target, len(a))
        lengths = []
        for kernel, *adapter in zip(kernels, a, b, scales, strict=True):
            names = ("adapter_a", "adapter_b", "adapter_scale")
            whole = with_adapter(
                ops.cast(kernel, "float32"),
                dict(zip(names, adapter, strict=True)),
            )
            inputs = tuple(range(adapter[0].ndim - 1))
            length = ops.sqrt(ops.sum(ops.square(whole), axis=inputs))
            lengths.append(to_host(length))
        lengths = np.stack(lengths)
        scales = scales.reshape(-1, *[1] * (lengths.ndim - 1))
        if BLOCKS not in place:
            scales, lengths = scales[0], lengths[0]
        yield place, scales, lengths
