"""What a backward pass stores, and what it recomputes."""

import keras
import numpy as np
import pytest

from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.blocks import LayerNorm
from keras_paligemma.layers.remat import recompute

jax_alone = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="only JAX chooses what is kept"
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@jax_alone
def test_attention_keeps_no_weights():
    import jax

    B, T, N, K, H = 2, 11, 4, 2, 6
    query, key = normal(B, T, N, H), normal(B, T, K, H, seed=1)
    mask = np.tril(np.ones((B, T, T), bool))
    _, backward = jax.vjp(
        lambda query, key, value: attend(query, key, value, mask, 50.0),
        query,
        key,
        key + 1,
    )
    kept = [leaf.size for leaf in jax.tree.leaves(backward)]
    # The mask is the largest array. Weights would also have an axis of heads.
    assert max(kept) <= B * T * max(T, N * H) < B * N * T * T


@jax_alone
def test_what_is_recomputed_has_the_same_gradients():
    import jax

    def gated(gate, up):
        return keras.ops.gelu(gate, approximate=True) * up

    x, y = normal(3, 5), normal(3, 5, seed=1)
    plain = jax.grad(lambda x, y: gated(x, y).sum(), (0, 1))(x, y)
    again = jax.grad(lambda x, y: recompute(gated)(x, y).sum(), (0, 1))(x, y)
    for array, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-6, atol=1e-7)


def test_a_layer_norm_is_keras_own():
    ours = LayerNorm(epsilon=1e-6)
    theirs = keras.layers.LayerNormalization(epsilon=1e-6)
    x_BTD = normal(2, 3, 8) * 5 + 2
    for layer in (ours, theirs):
        layer.build(x_BTD.shape)
        layer.set_weights([normal(8, seed=1), normal(8, seed=2)])
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(ours(x_BTD)),
        keras.ops.convert_to_numpy(theirs(x_BTD)),
    )


@jax_alone
def test_a_layer_norm_keeps_its_arguments_alone():
    import jax

    layer = LayerNorm()
    x_BTD = normal(2, 3, 8)
    layer.build(x_BTD.shape)
    _, backward = jax.vjp(layer, x_BTD)
    kept = [leaf.size for leaf in jax.tree.leaves(backward)]
    assert sorted(kept)[-1] == x_BTD.size > sorted(kept)[-2]


@jax_alone
def test_the_compiler_does_not_merge_what_is_recomputed():
    import jax

    function = recompute(lambda x: keras.ops.tanh(x) * x)
    step = jax.jit(jax.value_and_grad(lambda x: (function(x) ** 2).sum()))
    text = step.lower(normal(64, 64)).compile().as_text()
    assert text.count(" tanh(") == 2


@jax_alone
def test_one_infinite_gradient_spoils_its_own_row_alone():
    import jax

    def last(x):
        return (recompute(keras.ops.tanh)(x) * scale_BT).sum()

    scale_BT = np.array([[np.inf, 1.0], [1.0, 1.0]], "float32")
    gradient = np.asarray(jax.grad(last)(normal(2, 2)))
    assert np.isfinite(gradient).tolist() == [[False, True], [True, True]]
