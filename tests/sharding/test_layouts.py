"""The layouts' table checked with every official size, without values."""

import math
import re

import keras
import pytest

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import presets
from keras_paligemma import without_values
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.sharding import layouts
from keras_paligemma.sharding.layouts import Layout

pytestmark = pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="optimizers on TensorFlow want values; layouts are JAX's alone",
)
SIZES = ("3b", "10b", "28b")
LAYOUTS = (
    Layout("weights", 1, 8),
    Layout("weights", 2, 4),
    Layout("tensor", 1, 8),
    Layout("tensor", 2, 4),
    Layout("both", 2, 4),
)


def official(size, resolution=224, form="scanned", lora=None):
    """Return an official model without values and its training variables."""
    known = presets.describe(f"pali_gemma2_pt_{size}_{resolution}")["backbone"]
    optimizer = Adam()
    with without_values():
        backbone = PaliGemmaBackbone(**known, form=form, dtype="bfloat16")
        if lora:
            backbone.enable_lora(lora, targets="all")
        optimizer.build(backbone.trainable_variables)
    return backbone, optimizer


@pytest.fixture(scope="module")
def models():
    return {size: official(size) for size in SIZES}


def split(layout, variable):
    return layout.axes(stable_name(variable.path), tuple(variable.shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_all_large_weights_are_split_whole(models, size, layout):
    backbone, optimizer = models[size]
    parts = {"model": layout.group, "batch": layout.groups}
    for variable in backbone.variables + optimizer.variables:
        axes = split(layout, variable)
        values = math.prod(variable.shape)
        if "/blocks/" in variable.path or "_blocks_" in variable.path:
            values //= variable.shape[0]
            assert axes[0] is None, "a scan slices the layer axis"
        if values >= layouts.SMALL:
            assert "model" in axes, variable.path
            if layout.strategy == "both":
                assert "batch" in axes, variable.path
        for axis, length in zip(axes, variable.shape, strict=True):
            assert axis is None or length % parts[axis] == 0
    whole = layouts.chip_bytes(Layout("data"), backbone.variables)
    share = layouts.chip_bytes(layout, backbone.variables) / whole
    count = layout.chips if layout.strategy == "both" else layout.group
    assert share < 1.02 / count


def test_moments_lie_as_their_weights(models):
    backbone, optimizer = models["10b"]
    moments = [variable for variable in optimizer.variables if variable.shape]
    twice = [
        variable for variable in backbone.trainable_variables for _ in (0, 1)
    ]
    for layout in LAYOUTS:
        found = sorted((split(layout, moment) for moment in moments), key=str)
        wanted = sorted(
            (split(layout, variable) for variable in twice), key=str
        )
        assert found == wanted


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_forms_have_the_same_layout(layout):
    stacked, state = official("3b", lora=8)
    unrolled, other = official("3b", form="unrolled", lora=8)
    wanted = {
        stable_name(variable.path): variable for variable in stacked.variables
    }
    for variable in unrolled.variables:
        name = stable_name(variable.path)
        axes = split(layout, wanted[name])
        if "/blocks/" in name:
            axes = axes[1:]
        assert split(layout, variable) == axes, name
    assert len(other.variables) > len(state.variables)
    for variable in other.variables:
        split(layout, variable)


def test_every_row_has_a_weight():
    backbone, _ = official("3b", lora=8)
    names = set(backbone.weights_by_name())
    low_bit = {name for name in layouts.TABLE if name.endswith("_scale")}
    low_bit -= {name for name in layouts.TABLE if "adapter" in name}
    # The patch embedding never has adapters. This adapter has no gain, bias or
    # head, which other adapters may have.
    no_adapter = {
        name
        for name in layouts.TABLE
        if name.startswith("vision_encoder/patch_embedding/adapter")
        or name.endswith(("adapter_gain", "adapter_bias", "adapter_head"))
    }
    no_bias = {
        name
        for name in layouts.TABLE
        if name.startswith("text_decoder") and name.endswith("bias")
    }
    unseen = set(layouts.TABLE) - names
    assert unseen == low_bit | no_adapter | no_bias
    assert not names - set(layouts.TABLE)


def test_heads_that_do_not_divide():
    name = "text_decoder/blocks/attention/key/kernel"
    shape = (26, 2304, 4, 256)
    tensor = Layout("tensor", 1, 4)
    assert tensor.axes(name, shape) == (None, None, "model", None)
    # With four heads on eight chips, the summed axis is sharded instead.
    tensor = Layout("tensor", 1, 8)
    assert tensor.axes(name, shape) == (None, "model", None, None)
    adapter = name.replace("kernel", "adapter_b")
    assert tensor.axes(adapter, (26, 8, 4, 256)) == (None,) * 4


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_low_bit_storage_lies_as_its_kernel(layout):
    name = "text_decoder/blocks/mlp/down/kernel"
    kernel = layout.axes(name, (46, 36864, 4608))
    # Two values per byte, and a scale for every 128 values.
    assert layout.axes(name, (46, 18432, 4608)) == kernel
    assert layout.axes(f"{name}_scale", (46, 288, 4608)) == kernel
    table = "text_decoder/token_embedding/table"
    one = layout.axes(f"{table}_scale", (257152, 1))
    assert one[1] is None


def test_an_unknown_variable_is_refused():
    with pytest.raises(ValueError, match=re.escape("text_decoder/new/kernel")):
        Layout("weights", 1, 8).axes("text_decoder/new/kernel", (8, 8))
    with pytest.raises(ValueError, match="mlp/up/kernel"):
        Layout("data").axes("text_decoder/blocks/mlp/up/kernel", (8,))


def test_bad_meshes_and_batches_name_what_works():
    with pytest.raises(ValueError, match="'data', 'weights', 'tensor'"):
        Layout("fsdp")
    with pytest.raises(ValueError, match="Expected: 8 or 16"):
        layouts.check_batch(9, 8, "weights 1x8")
    with pytest.raises(ValueError, match="Expected: 8"):
        layouts.check_batch(3, 8, "weights 1x8")
    for shape, message in (
        ((4,), r"two axes. Received: shape=\(4,\)"),
        (4, "two axes. Received: shape=4"),
        ((4, 0), r"positive integers. Received: \(4, 0\)"),
        ((1, 0.5), "positive integers"),
    ):
        with pytest.raises(ValueError, match=message):
            layouts.distribute("weights", shape, ["cpu:0"])
    with pytest.raises(ValueError, match=r"Expected: devices=\['cpu:0'\]"):
        layouts.distribute("data", devices="cpu:0")
