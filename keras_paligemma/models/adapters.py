"""Low-rank adapters of a backbone: added, read and written."""

import types

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import peft
from keras_paligemma.checkpoints.float_views import float_views
from keras_paligemma.layers.projection import Projection

ATTENTION_TARGETS = ("query", "key", "value", "output")
LORA_TARGETS = (*peft.DECODER, *peft.VISION)


def enable(backbone, rank, alpha=None, targets=None):
    """Freeze a backbone and add adapters; see `PaliGemmaBackbone`."""
    targets = tuple(targets or ATTENTION_TARGETS)
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if unknown:
        raise ValueError(
            f"Unknown targets of LoRA. Received: {unknown}. Expected some of "
            f"{LORA_TARGETS}."
        )
    _refuse_second(backbone)
    for variable in backbone.variables:
        variable.trainable = False
    for tower, prefix in (
        (backbone.text_decoder, ""),
        (backbone.vision_encoder, "vision."),
    ):

        def adapt(block, prefix=prefix):
            for layer in block._flatten_layers():
                if (
                    isinstance(layer, Projection)
                    and prefix + layer.name in targets
                ):
                    layer.add_adapter(rank, alpha or rank)

        if any(one.startswith("vision.") == bool(prefix) for one in targets):
            tower.blocks.change(adapt)
    backbone.lora = {
        "rank": rank,
        "alpha": alpha or rank,
        "targets": list(targets),
    }


def load(backbone, folder):
    """Add adapters from a folder; see `PaliGemmaBackbone.load_adapter`."""
    _refuse_second(backbone)
    lora, rows, open_files = peft.read(folder)
    weights = float_views(backbone.weights_by_name())
    with open_files() as tensors:
        # Compared before anything is added, so that what does not fit
        # changes nothing.
        expected = {
            row.ours: types.SimpleNamespace(
                shape=_adapter_shape(row, weights, lora["rank"])
            )
            for row in rows
        }
        engine.check(expected, rows, tensors.shapes)
        enable(backbone, **lora)
        weights = backbone.weights_by_name()
        engine.load(
            {row.ours: weights[row.ours] for row in rows}, rows, tensors
        )


def _adapter_shape(row, weights, rank):
    """Give the shape of an adapter's half, layer axis first."""
    place, half = row.ours.rsplit("/", 1)
    layers, *kernel = engine.shape_of(weights[f"{place}/kernel"])
    axes = len(row.axes.split("->")[1].split()) - 1
    if half == "adapter_a":
        return (layers, *kernel[:axes], rank)
    return (layers, rank, *kernel[-axes:])


def save(backbone, folder, base=None):
    """Write a backbone's adapters; see `PaliGemmaBackbone.save_adapter`."""
    if backbone.lora is None:
        raise ValueError(
            "There are no adapters to write. Call `enable_lora` or "
            "`load_adapter` first, or `save_to_preset` for the whole model."
        )
    rows = peft.rows(backbone.lora["targets"])
    weights = backbone.weights_by_name()
    arrays = engine.write(weights, rows, engine.to_numpy)
    peft.write(folder, backbone.lora, arrays, base)


def _refuse_second(backbone):
    if backbone.lora is not None:
        raise ValueError(
            f"The backbone has adapters already: {backbone.lora}. Load the "
            "preset again for others."
        )
