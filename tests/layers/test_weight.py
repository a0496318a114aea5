"""A weight has the same shape, values and errors in each form."""

import keras
import numpy as np
import pytest

from keras_paligemma.layers.weight import Weight
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.quantization.storage import QuantizedFormat

FORMS = (None, "scanned", "unrolled")
LAYERS, SHAPE = 3, (4, 2)


def numbers(form):
    shape = SHAPE if form is None else (LAYERS, *SHAPE)
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def variables(form, value, dtype="float32"):
    layers = value if form == "unrolled" else [value]
    return tuple(
        # Torch has no gradients of integers.
        keras.Variable(layer, dtype=dtype, trainable=dtype == "float32")
        for layer in layers
    )


def quantized(form):
    """Return integers and scales of a zero kernel, as in a model."""
    layout = QuantizedFormat("int8", SHAPE, (0,))
    layers = () if form is None else (LAYERS,)
    weights = {}
    for name, shape, dtype in (
        ("kernel", layout.stored_shape, "int8"),
        ("kernel_scale", layout.scale_shape, "bfloat16"),
    ):
        value = np.zeros((*layers, *shape), "float32")
        weights[name] = Weight(variables(form, value, dtype), form)
        for variable in weights[name].variables:
            variable.quantized_format = layout
    return layout, weights


@pytest.mark.parametrize("form", FORMS)
def test_reads_and_assigns(form):
    value = numbers(form)
    weight = Weight(variables(form, 0 * value), form)
    assert weight.shape == value.shape and weight.size == value.size
    assert (weight.layer_shape, weight.dtype) == (SHAPE, "float32")
    assert weight.num_layers == (1 if form is None else LAYERS)
    assert not weight.read().any()
    weight.assign(value)
    np.testing.assert_array_equal(weight.read(), value)
    layers = value[None] if form is None else value
    np.testing.assert_array_equal([*weight.read_layers()], layers)
    weight.assign_layers(iter(2 * layers))
    np.testing.assert_array_equal(weight.read(), 2 * value)
    with pytest.raises(ValueError, match=r"Received: .* shape \(1, 2\)"):
        weight.assign(value[..., :1, :2] if form is None else value[0, :1])
    with pytest.raises(ValueError, match="does not fit the weight"):
        weight.assign_layers(layers[:, :1])
    with pytest.raises(ValueError, match="shorter"):
        weight.assign_layers(layers[1:])


@pytest.mark.parametrize("form", FORMS)
def test_trainable_is_that_of_all_layers(form):
    weight = Weight(variables(form, numbers(form)), form)
    assert weight.trainable
    weight.set_trainable(False)
    assert not weight.trainable
    assert not any(variable.trainable for variable in weight.variables)


@pytest.mark.parametrize("form", FORMS)
def test_update_changes_each_layer(form):
    value = numbers(form)
    scale = np.float32(3) if form is None else np.arange(3, dtype="float32")
    weight = Weight(variables(form, value), form)
    other = Weight(variables(form, scale), form)
    weight.update(lambda kernel, factor: kernel * factor, other)
    wanted = value * np.reshape(scale, (-1, 1, 1) if form else ())
    np.testing.assert_allclose(weight.read(), wanted, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_integers_are_read_as_floats_and_round(form):
    layout, stored = quantized(form)
    floats = dequantized(stored | {"bias": Weight(variables(None, 1.0))})
    assert [*floats] == ["kernel", "bias"]
    weight, value = floats["kernel"], numbers(form)
    assert weight.shape == value.shape and weight.dtype == "float32"
    assert weight.quantized_format is layout
    assert stored["kernel"].quantized_format is None
    assert stored["kernel"].dtype == "int8"
    weight.assign(value)
    layers = value[None] if form is None else value
    for layer, read, kernel, scale in zip(
        layers,
        weight.read_layers(),
        stored["kernel"].read_layers(),
        stored["kernel_scale"].read_layers(),
        strict=True,
    ):
        wanted = layout.quantize(layer)
        np.testing.assert_array_equal(kernel, wanted[0])
        np.testing.assert_array_equal(scale, wanted[1])
        np.testing.assert_array_equal(
            read, wanted[0] * wanted[1].astype("float32")
        )
    assert np.abs(weight.read() - value).max() < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_stored_in_any_order(form):
    layout, stored = quantized(form)
    value = numbers(form)
    layers = value[None] if form is None else value
    weight = dequantized(stored)["kernel"]
    write = weight.layer_writer()
    for number in reversed(range(len(layers))):
        write(number, *layout.quantize(layers[number]))
    wanted = dequantized(quantized(form)[1])["kernel"]
    wanted.assign(value)
    np.testing.assert_array_equal(weight.read(), wanted.read())


def test_one_unrolled_block_keeps_its_layer_axis():
    weight = Weight(variables("unrolled", numbers("unrolled")[:1]), "unrolled")
    assert weight.shape == (1, *SHAPE) and weight.read().shape == (1, *SHAPE)


def test_arrays_on_the_host_are_read():
    value = numbers("scanned")
    weight = Weight((value,), "scanned")
    assert weight.shape == value.shape and weight.dtype == "float32"
    np.testing.assert_array_equal(weight.read(), value)
    np.testing.assert_array_equal([*weight.layers()], value)
