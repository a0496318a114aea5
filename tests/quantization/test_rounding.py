"""Rounding for given examples, compared with rounding to the nearest."""

import numpy as np
import pytest
from keras import ops

from keras_paligemma.quantization.rounding import order_and_factor
from keras_paligemma.quantization.rounding import round_for
from keras_paligemma.quantization.storage import QuantizedFormat

# One group, several, a last group of another length, heads, a table.
SHAPES = [
    ((24, 40), (0,)),
    ((256, 6), (0,)),
    ((300, 5), (0,)),
    ((3, 130, 7), (0, 1)),
    ((9, 140), (1,)),
]


def floats(layout, parts):
    stored, scale = parts
    return ops.convert_to_numpy(
        layout.dequantize(
            ops.convert_to_tensor(stored),
            ops.convert_to_tensor(scale.astype("float32")),
            "float32",
        )
    )


def inputs_of(layout, count, seed):
    """Return correlated inputs, as activations are."""
    size = np.prod([layout.shape[axis] for axis in layout.axes])
    random = np.random.default_rng(0)
    mixed = random.normal(size=(size // 3, size)) * np.linspace(0.1, 3, size)
    random = np.random.default_rng(seed)
    noise = 0.1 * random.normal(size=(count, size))
    return random.normal(size=(count, size // 3)) @ mixed + noise


def product(layout, x, array):
    kernel = np.moveaxis(array, layout.axes, range(len(layout.axes)))
    return x @ kernel.reshape(x.shape[1], -1)


@pytest.mark.parametrize("shape, axes", SHAPES)
def test_products_of_unseen_inputs_change_less(shape, axes):
    layout = QuantizedFormat("int4", shape, axes)
    array = np.random.default_rng(1).standard_t(4, shape).astype("float32")
    seen, unseen = (inputs_of(layout, 2000, seed) for seed in (2, 3))
    parts = round_for(layout, array, *order_and_factor(seen.T @ seen))
    assert (parts[0].dtype, parts[0].shape) == ("int8", layout.stored_shape)
    assert (parts[1].dtype, parts[1].shape) == ("bfloat16", layout.scale_shape)
    plain, found = (
        np.linalg.norm(product(layout, unseen, array - floats(layout, rounded)))
        for rounded in (layout.quantize(array), parts)
    )
    assert found < 0.65 * plain


def test_independent_inputs_are_rounded_to_the_nearest():
    layout = QuantizedFormat("int4", (256, 6), (0,))
    array = np.random.default_rng(1).normal(size=(256, 6)).astype("float32")
    for moment in (np.diag(np.arange(256.0)), np.zeros((256, 256))):
        found = round_for(layout, array, *order_and_factor(moment))
        wanted = layout.quantize(array, found[1])
        np.testing.assert_array_equal(found[0], wanted[0])
    # Scales minimize the rounding error, instead of covering the peaks.
    groups = array.reshape(32, 8, 6)
    covering = (np.abs(groups).max(1) / 7).astype(found[1].dtype)
    assert (np.abs(found[1]) <= covering).all()
    covered, plain, best = (
        np.square(groups - floats(layout, rounded).reshape(groups.shape)).sum(1)
        for rounded in (
            layout.quantize(array, covering),
            layout.quantize(array),
            found,
        )
    )
    assert best.sum() ** 0.5 < 0.95 * covered.sum() ** 0.5
    assert (best <= plain).all() and best.sum() < 0.98 * plain.sum()


def test_scales_weight_errors_by_the_inputs_second_moments():
    layout = QuantizedFormat("int4", (64, 50), (0,))
    random = np.random.default_rng(1)
    array = random.standard_t(4, (64, 50)).astype("float32")
    moment = random.exponential(size=64) ** 2
    weighted, even = (
        np.square(array - floats(layout, found))
        for found in (
            round_for(layout, array, *order_and_factor(np.diag(values), 0))
            for values in (moment, np.ones(64))
        )
    )
    assert weighted.sum() > even.sum()
    assert (moment @ weighted).sum() < 0.96 * (moment @ even).sum()


def test_weights_of_zero_stay():
    layout = QuantizedFormat("int4", (8, 3), (0,))
    found = round_for(
        layout, np.zeros((8, 3), "float32"), *order_and_factor(np.eye(8))
    )
    assert not floats(layout, found).any()


def test_the_factor_is_that_of_the_damped_moment():
    x = np.random.default_rng(0).normal(size=(9, 5)) * [1, 3, 2, 0.5, 4]
    moment = x.T @ x
    order, R = order_and_factor(moment, damping=0.5)
    assert (np.diff(np.diag(moment)[order]) < 0).all()
    np.testing.assert_array_equal(R, np.triu(R))
    wanted = moment + 0.5 * np.diag(moment).mean() * np.eye(5)
    wanted = wanted[order][:, order]
    np.testing.assert_allclose(R @ R.T, wanted, rtol=1e-5, atol=1e-5)


def test_given_scales_are_kept():
    layout = QuantizedFormat("int4", (256, 6), (0,))
    scale = layout.quantize(np.ones((256, 6), "float32"))[1]
    values = np.random.default_rng(0).integers(-8, 8, (256, 6))
    array = values * scale[0].astype("float32")
    found = layout.quantize(array, scale)
    np.testing.assert_array_equal(found[1], scale)
    np.testing.assert_array_equal(floats(layout, found), array)
    # Values beyond the range are clipped.
    np.testing.assert_array_equal(
        floats(layout, layout.quantize(9 * np.ones_like(array), scale)),
        -8 * np.ones_like(array) * scale[0].astype("float32"),
    )
