"""Quantized kernels: rounding, packing, gradients, memory."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.layers import cpu_products
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.stack import LayerStack
from keras_paligemma.layers.weight import Weight
from keras_paligemma.models.text_decoder import TextDecoder
from keras_paligemma.models.text_decoder import TokenEmbedding
from keras_paligemma.quantization import products
from keras_paligemma.quantization.storage import QuantizedFormat
from keras_paligemma.quantization.storage import table_mode
from tests.helpers.gradients import differentiate
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import run

# Shapes and their summed axes: several groups, one short group, a padded last
# group, an odd axis, two axes, a table, groups that do not fill a tile, and one
# value each.
SHAPES = [
    ((256, 6), (0,)),
    ((24, 3, 4), (0,)),
    ((300, 5), (0,)),
    ((7, 3), (0,)),
    ((3, 6, 5), (0, 1)),
    ((5000, 12), (1,)),
    ((1160, 2), (0,)),
    ((9, 130, 2), (0, 1)),
    ((1, 2), (0,)),
]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("shape, axes", SHAPES)
def test_rounding_is_to_the_nearest(shape, axes, mode):
    random = np.random.default_rng(0)
    array = random.standard_t(4, shape).astype("float32")
    array[..., :1] = 0
    layout = QuantizedFormat(mode, shape, axes)
    stored, scale = layout.quantize(array)
    assert (stored.dtype, stored.shape) == ("int8", layout.stored_shape)
    assert (scale.dtype, scale.shape) == ("bfloat16", layout.scale_shape)
    found = ops.convert_to_numpy(
        layout.dequantize(
            ops.convert_to_tensor(stored),
            ops.convert_to_tensor(scale.astype("float32")),
            "float32",
        )
    )
    scale = scale.astype("float32")
    if mode == "int4":
        # Ten groups are padded to sixteen scales, and 38 to 40.
        padded = {10: 16, 38: 40}
        assert layout.scales == padded.get(layout.groups, layout.groups)
        scale = np.repeat(scale, layout.group, axes[-1])
        scale = np.take(scale, range(shape[axes[-1]]), axes[-1])
    assert (np.abs(found - array) <= np.abs(scale) / 2).all()
    np.testing.assert_array_equal(found[..., :1], array[..., :1])
    # Steps are as small as possible, except for the scale's 8 significant bits.
    largest = {"int8": 127, "int4": 7.5}[mode]
    assert np.abs(scale).max() <= np.abs(array).max() / largest * (1 + 2**-7)
    assert np.abs(found / scale).max() > 0.99 * largest - 1


@pytest.mark.parametrize("sign", [1, -1])
def test_the_farthest_value_of_int4_is_the_smallest_integer(sign):
    """There is one more integer below zero than above."""
    layout = QuantizedFormat("int4", (4, 1), (0,))
    array = sign * np.array([[4.0], [0.5], [-3.5], [-1.0]], "float32")
    stored, scale = layout.quantize(array)
    assert scale.item() == -0.5 * sign
    np.testing.assert_array_equal(
        stored.view("uint8"), [[8 | 7 << 4], [15 | 2 << 4]]
    )
    # On the other side, half a step beyond 7 is still rounded to 7.
    array = sign * np.array([[3.75], [0], [-3.75], [0]], "float32")
    stored, scale = layout.quantize(array)
    assert abs(scale.item()) == 0.5


def test_narrow_layers_have_small_groups():
    def group(shape, axes):
        return QuantizedFormat("int4", shape, axes).group

    # Of the nano preset, and of published models.
    assert group((128, 384), (0,)) == group((4, 32, 128), (0, 1)) == 8
    assert group((2304, 9216), (0,)) == group((8, 256, 2304), (0, 1)) == 128
    assert group((16, 72, 1152), (0, 1)) == 72
    assert group((1023, 8), (0,)) == 8
    assert group((1024, 8), (0,)) == 128


def test_a_narrow_table_of_int4_is_int8():
    assert table_mode("int4", 128) == "int8"
    assert table_mode("int4", 2304) == "int4"
    assert table_mode(None, 128) is None
    decoder = TextDecoder(TextDecoderConfig(**TEXT), quantization="int4")
    assert decoder.token_embedding.quantized_format.mode == "int8"


def test_packing_is_exact():
    """Pack all pairs of 4-bit values into bytes, and unpack them."""
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    array = np.stack([low, high]).reshape(2, -1).astype("float32")
    # The scale of a column is one if its smallest value is -8.
    array = np.concatenate([array, np.full_like(array, -8)])
    layout = QuantizedFormat("int4", array.shape, (0,))
    stored, scale = layout.quantize(array)
    assert stored.shape == (2, 256) and (scale == 1).all()
    found = layout.dequantize(
        ops.convert_to_tensor(stored), ops.ones(scale.shape), "float32"
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(found), array)


def test_scales_of_bfloat16_cost_nothing():
    """Rounding the scales first widens the steps by only 0.4 % on average."""
    array = np.random.default_rng(0).normal(size=(512, 64)).astype("float32")
    peak = np.abs(array).max(0) / 127
    wanted = array - np.rint(array / peak) * peak
    stored, scale = QuantizedFormat("int8", array.shape, (0,)).quantize(array)
    found = array - stored * scale.astype("float32")
    assert np.linalg.norm(found) < 1.008 * np.linalg.norm(wanted)


def test_errors():
    with pytest.raises(ValueError, match="Received: 'int2'"):
        Projection((3,), (4,), quantization="int2")
    layout = QuantizedFormat("int8", (3, 4), (0,))
    with pytest.raises(ValueError, match=r"Received: \(4, 3\)"):
        layout.quantize(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="damaged"):
        layout.quantize(np.full((3, 4), np.nan))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("part", [2**24, 60])
def test_projection_is_that_of_its_float_kernel(mode, part, monkeypatch):
    """The kernel is dequantized at once or in parts."""
    monkeypatch.setattr(products, "PART", part)
    monkeypatch.setattr(products, "ALIGNED", (1,))
    keras.utils.set_random_seed(0)
    layer = Projection((3, 10), (4, 2), True, quantization=mode)
    layer.build()
    assert not layer.kernel.trainable and not layer.kernel_scale.trainable
    kernel = Weight((layer.kernel,), scales=(layer.kernel_scale,)).read()
    plain = Projection((3, 10), (4, 2), True)
    plain.build()
    Weight((plain.kernel,)).assign(kernel)
    assert 0.5 < np.std(kernel) * 30**0.5 < 1.5
    for projection in (layer, plain):
        keras.utils.set_random_seed(1)
        projection.add_adapter(2, 4)
        projection.adapter_b.assign(ops.ones(projection.adapter_b.shape))
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 10)).astype("float32")

    def gradients(layer):
        adapters = [layer.adapter_a, layer.adapter_b]

        def loss(values):
            x, *adapted = values
            mapping = list(zip(adapters, adapted, strict=True))
            with keras.StatelessScope(mapping):
                return ops.sum(ops.sin(layer(x)))

        values = [adapter.value for adapter in adapters]
        return differentiate(loss, [ops.convert_to_tensor(x), *values])

    np.testing.assert_allclose(
        ops.convert_to_numpy(run(layer, x)),
        ops.convert_to_numpy(run(plain, x)),
        atol=1e-5,
    )
    for found, wanted in zip(gradients(layer), gradients(plain), strict=True):
        scale = np.abs(wanted).max()
        assert scale > 0
        np.testing.assert_allclose(found, wanted, atol=1e-5 * scale)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("part", [2**24, 60])
def test_answers_define_no_gradients(mode, part, monkeypatch):
    monkeypatch.setattr(products, "PART", part)
    monkeypatch.setattr(products, "ALIGNED", (1,))
    # Both multiply floats, as with many rows.
    monkeypatch.setattr(cpu_products, "should_use_integers", lambda *_: False)
    layer = Projection((3, 10), (4, 2), quantization=mode)
    layer.build()
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 10)).astype("float32")
    wanted = ops.convert_to_numpy(run(layer, x))
    monkeypatch.delattr(ops, "custom_gradient")
    with cpu_products.answering_scope():
        found = ops.convert_to_numpy(run(layer, x))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(AttributeError, match="custom_gradient"):
        run(layer, x)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("part", [2**24, 300])
def test_table_embeds_and_is_the_head(mode, part, monkeypatch):
    """The head uses all rows at once or some at a time."""
    monkeypatch.setattr(products, "PART", part)
    monkeypatch.setattr(products, "ALIGNED", (1,))
    layer = TokenEmbedding(12, 140, mode)
    layer.build()
    table = layer.quantized_format.dequantize(
        layer.table.value, layer.table_scale.value, "float32"
    )
    plain = TokenEmbedding(12, 140)
    plain.build()
    plain.table.assign(table)
    ids = np.array([[0, 10, 3], [3, 1, 9]])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(run(layer, ids)),
        ops.convert_to_numpy(run(plain, ids)),
    )
    x = np.random.default_rng(0).normal(size=(2, 3, 140)).astype("float32")
    x = ops.convert_to_tensor(x)
    np.testing.assert_allclose(
        ops.convert_to_numpy(run(layer.logits, x)),
        ops.convert_to_numpy(run(plain.logits, x)),
        atol=1e-5,
    )

    def gradient(layer):
        return differentiate(
            lambda x: ops.sum(ops.sin(layer.logits(x[0]))), [x]
        )

    np.testing.assert_allclose(
        gradient(layer)[0], gradient(plain)[0], atol=1e-5
    )


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("part", [2**24, 300])
def test_a_stack_lends_its_layers(mode, part, monkeypatch):
    """Layers are dequantized as a whole, or in parts of the stack."""
    monkeypatch.setattr(products, "PART", part)

    def stack(form):
        stack = LayerStack(
            lambda: Projection((12,), (12,), quantization=mode, name="block"),
            num_layers=3,
            form=form,
            remat="block",
            name="blocks",
        )
        stack.build()
        return stack

    unrolled, stacked = stack("unrolled"), stack("scanned")
    for name, weight in unrolled.weights_by_name().items():
        stacked.weights_by_name()[name].assign(weight.read())
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype("float32")
    x = ops.convert_to_tensor(x)

    def gradient(stack):
        return differentiate(lambda x: ops.sum(ops.sin(stack(x[0]))), [x])

    np.testing.assert_allclose(
        ops.convert_to_numpy(run(stacked, x)),
        ops.convert_to_numpy(run(unrolled, x)),
        atol=1e-5,
    )
    wanted = gradient(unrolled)[0]
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(gradient(stacked)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_float16_holds_products_and_gradients(mode):
    """Sums of integers may exceed float16, and scaled gradients vanish."""
    layer = Projection((64,), (16,), quantization=mode, dtype="float16")
    layer.build()
    kernel = np.random.default_rng(0).normal(size=(64, 16)) * 0.02
    weight = Weight((layer.kernel,), scales=(layer.kernel_scale,))
    weight.assign(kernel.astype("float32"))
    kernel = weight.read()
    x = np.zeros((2, 64), "float16")
    x[:, 3], x[:, 5] = 600, -500
    x = ops.convert_to_tensor(x)
    found = ops.convert_to_numpy(run(layer, x))
    wanted = ops.convert_to_numpy(x).astype("float32") @ kernel
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())
    (found,) = differentiate(lambda x: ops.sum(layer(x[0]) * 2e-5), [x])
    wanted = np.broadcast_to(2e-5 * kernel.sum(1), x.shape)
    # The smallest float16.
    np.testing.assert_allclose(found, wanted, atol=6e-8)


def test_bfloat16_embedding_scale_is_rounded_as_of_floats():
    layer = TokenEmbedding(5, 2304, "int8", dtype="bfloat16")
    layer.build()
    layer.table.assign(np.ones((5, 2304)))
    layer.table_scale.assign(np.ones((5, 1)))
    found = ops.convert_to_numpy(ops.cast(layer(np.array([[1]])), "float32"))
    assert (found == 48).all()
    assert np.array(ml_dtypes.bfloat16(2304**0.5), "float32") == 48
