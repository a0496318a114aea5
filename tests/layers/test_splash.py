"""The fused kernel: by an interpreter beside the plain form, and for a TPU."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma.compat import compiling_for
from keras_paligemma.distribution.layouts import distribute
from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.splash import PrefixMask
from keras_paligemma.layers.splash import attend_fused
from keras_paligemma.layers.splash import suits

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the kernel is JAX's"
)
PREFIX, RESPONSE = 100, 50


def draw(heads=4, key_heads=2, head_dim=128, batch=2):
    """Draw tensors whose logits are far beyond the cap, and padding."""
    random = np.random.default_rng(0)
    tokens = PREFIX + RESPONSE
    query, upstream = random.normal(size=(2, batch, tokens, heads, head_dim))
    key, value = random.normal(size=(2, batch, tokens, key_heads, head_dim))
    valid = random.random((batch, tokens)) > 0.2
    # A row with holes everywhere, and one as the preprocessor makes them.
    valid[1] = True
    valid[1, 60:75] = valid[1, -20:] = False
    arrays = [one.astype("float32") for one in (query, key, value, upstream)]
    # Padding gets no gradient, as in a loss.
    arrays[3] *= valid[:, :, None, None]
    return arrays, valid


def value_and_gradients(function, arrays, valid):
    import jax

    *inputs, upstream = arrays

    def weighted(*inputs):
        mixed = function(*inputs)
        return ops.sum(mixed * upstream), mixed * valid[:, :, None, None]

    (_, mixed), gradients = jax.jit(
        jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)
    )(*inputs)
    return [np.asarray(one) for one in (mixed, *gradients)]


def plain(valid, cap):
    response = np.zeros_like(valid)
    response[:, PREFIX:] = True
    mask = attention_mask(valid, response)
    return lambda *inputs: attend(*inputs, mask, cap)


def fused(valid, cap, prefix=PREFIX):
    mask = PrefixMask(valid[:, :prefix], valid[:, prefix:])
    return lambda *inputs: attend_fused(*inputs, mask, cap, interpret=True)


@pytest.mark.parametrize("cap", [5.0, None])
def test_kernel_is_the_plain_form(cap):
    arrays, valid = draw()
    ours = value_and_gradients(fused(valid, cap), arrays, valid)
    theirs = value_and_gradients(plain(valid, cap), arrays, valid)
    others = value_and_gradients(
        plain(valid, None if cap else 5.0), arrays, valid
    )
    for our, their, other in zip(ours, theirs, others, strict=True):
        scale = np.abs(their).max()
        np.testing.assert_allclose(our, their, atol=1e-5 * scale, rtol=0)
        # With another cap, or none, it would be far off.
        assert np.abs(our - other).max() > 0.05 * scale


def test_kernel_takes_a_prefix_alone():
    arrays, valid = draw(3, 1)
    ours = fused(valid, 50.0, PREFIX + RESPONSE)(*arrays[:3])
    mask = attention_mask(valid, np.zeros_like(valid))
    theirs = attend(*arrays[:3], mask, 50.0)
    np.testing.assert_allclose(
        np.asarray(ours)[valid], np.asarray(theirs)[valid], atol=5e-5
    )


@pytest.mark.parametrize(
    "strategy, shape", [("data", None), ("weights", (2, 4)), ("tensor", (4, 2))]
)
def test_kernel_is_the_plain_form_on_eight_devices(strategy, shape):
    if len(keras.distribution.list_devices()) != 8:
        pytest.skip("asks for eight devices")
    arrays, valid = draw(batch=8)
    theirs = plain(valid, 5.0)(*arrays[:3])
    with distribute(strategy, shape).scope(), compiling_for("tpu"):
        assert suits(8, 2, 128)
        ours = fused(valid, 5.0)(*arrays[:3])
    np.testing.assert_allclose(
        np.asarray(ours)[valid], np.asarray(theirs)[valid], atol=5e-5
    )


def test_kernel_runs_where_it_suits():
    assert not suits(8, 4, 256)
    with compiling_for("tpu"):
        assert suits(8, 4, 256) and suits(None, 4, 256)
        assert not suits(8, 16, 72)
    with compiling_for("gpu"):
        assert not suits(8, 4, 256)
