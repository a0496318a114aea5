"""Attention computed head by head, compared with the plain form."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma.compat import compiling_for
from keras_paligemma.layers import cpu_attention
from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.cache import to_int8
from keras_paligemma.layers.remat import rematerialize

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the loop is JAX's"
)
B, T, N, K, H = 2, 190, 6, 3, 8
CAP = 3.0


def draw(seed=0):
    """Draw tensors whose logits reach the cap, and masks with padding."""
    random = np.random.default_rng(seed)
    query, upstream = random.normal(size=(2, B, T, N, H)) * 2
    key, value = random.normal(size=(2, B, T, K, H))
    valid = random.random((B, T)) > 0.2
    response = np.arange(T) >= 150
    mask = attention_mask(valid, np.tile(response, (B, 1)))
    arrays = [
        array.astype("float32") for array in (query, key, value, upstream)
    ]
    return *arrays, np.asarray(mask)


def plain(query, key, value, mask, cap):
    """Compute attention as on a machine without the CPU form."""
    with compiling_for("gpu"):
        return attend(query, key, value, mask, cap)


def value_and_gradients(function, arrays, mask, cap):
    import jax

    *inputs, upstream = arrays

    @jax.jit
    def both(*inputs):
        mixed, backward = jax.vjp(
            lambda *inputs: function(*inputs, mask, cap), *inputs
        )
        return mixed, *backward(upstream.astype(mixed.dtype))

    return both(*inputs)


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_the_plain_ones(cap, masked):
    *arrays, mask = draw()
    mask = mask if masked else None
    assert cpu_attention.should_use_cpu_attention(
        arrays[0].shape, arrays[1].shape
    )
    pairs = zip(
        value_and_gradients(attend, arrays, mask, cap),
        value_and_gradients(plain, arrays, mask, cap),
        strict=True,
    )
    for ours, theirs in pairs:
        largest = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * largest)


def test_queries_may_be_fewer_than_keys():
    query, key, value, upstream, mask = draw()
    arrays = (query[:, -180:], key, value, upstream[:, -180:])
    ours = value_and_gradients(attend, arrays, mask[:, -180:], CAP)
    theirs = value_and_gradients(plain, arrays, mask[:, -180:], CAP)
    for our, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, other, rtol=0, atol=3e-5)


def one_token(dtype):
    """Return a query of one token, and a cache of a dtype, with its mask."""
    query, key, value, _, mask = draw()
    query, mask = query[:, -1:], mask[:, -1:]
    if dtype == "int8":
        return query, to_int8(key), to_int8(value), mask
    return *(ops.cast(array, dtype) for array in (query, key, value)), mask


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_one_token_attends_by_sums(monkeypatch, dtype, cap):
    import jax

    query, key, value, mask = one_token(dtype)
    used = []
    for name in ("token_logits", "token_mix"):
        function = getattr(cpu_attention, name)
        monkeypatch.setattr(
            cpu_attention,
            name,
            lambda *inputs, function=function: (
                used.append(function.__name__) or function(*inputs)
            ),
        )
    attend_once = jax.jit(lambda *inputs: attend(*inputs, cap))
    found = attend_once(query, key, value, mask)
    assert used == ["token_logits", "token_mix"]
    wanted = plain(query, key, value, mask, cap)
    assert used == ["token_logits", "token_mix"]
    largest = float(np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * largest)


def test_one_token_of_bfloat16_attends_by_products():
    query, key, value, mask = one_token("bfloat16")
    found, wanted = (f(query, key, value, mask, CAP) for f in (attend, plain))
    np.testing.assert_array_equal(
        *(np.asarray(array, "float32") for array in (found, wanted))
    )


def test_bfloat16_is_rounded_where_the_plain_form_rounds():
    *arrays, mask = draw()
    half = [ops.cast(array, "bfloat16") for array in arrays[:3]]
    ours = attend(*half, mask, CAP)
    theirs = plain(*half, mask, CAP)
    assert ours.dtype == theirs.dtype == half[0].dtype
    ours, theirs = (np.asarray(array, "float32") for array in (ours, theirs))
    # Another order of summation changes the last bit of some weights.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2**-8)
    assert (ours == theirs).mean() > 0.98


def test_gradients_of_bfloat16_are_nearer_than_the_plain_ones():
    *arrays, mask = draw()
    half = [np.asarray(ops.cast(array, "bfloat16")) for array in arrays]
    exact = value_and_gradients(
        plain, [array.astype("float32") for array in half], mask, CAP
    )
    ours = value_and_gradients(attend, half, mask, CAP)
    theirs = value_and_gradients(plain, half, mask, CAP)
    for our, other, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert our.dtype == half[0].dtype
        errors = [
            float(np.abs(np.asarray(each, "float32") - true).mean())
            for each in (our, other)
        ]
        assert errors[0] <= errors[1]


def test_a_row_that_sees_nothing_is_finite():
    *arrays, mask = draw()
    mask = np.zeros_like(mask)
    for gradient in value_and_gradients(attend, arrays, mask, CAP):
        assert np.isfinite(gradient).all()


def test_nothing_is_as_large_as_the_logits_of_all_heads():
    import jax

    *arrays, mask = draw()

    def step(*inputs):
        return (attend(*inputs, mask, CAP) * arrays[3]).sum()

    step = jax.jit(jax.grad(step, (0, 1, 2)))
    made = step.lower(*arrays[:3]).compile()
    one_head = T * T * 4 * N // K
    # At most four arrays of one head, plus the transposed inputs.
    most = 4 * one_head + 8 * arrays[0].nbytes
    assert made.memory_analysis().temp_size_in_bytes < most
    assert most < 2 * B * N * T * T * 4


@pytest.mark.parametrize("kind", [None, "dots", "block"])
def test_nothing_of_all_heads_is_kept(kind):
    import jax

    *arrays, mask = draw()

    def double(*inputs):
        return attend(*[2 * input for input in inputs], mask, CAP)

    _, backward = jax.vjp(rematerialize(double, kind), *arrays[:3])
    kept = [leaf.size for leaf in jax.tree.leaves(backward)]
    assert max(kept) == mask.size < B * N * T * T


def test_calls_outside_of_a_program_compile_once():
    *arrays, mask = draw()
    made = cpu_attention._attention(CAP)
    attend(*arrays[:3], mask, CAP)
    before = made._cache_size()
    attend(*arrays[:3], mask, CAP)
    assert made._cache_size() == before > 0


def test_where_it_suits():
    long, short = (2, 256, 4, 8), (2, 1, 4, 8)
    assert cpu_attention.should_use_cpu_attention(long, long)
    assert not cpu_attention.should_use_cpu_attention(short, long)
    assert not cpu_attention.should_use_cpu_attention((None, *long[1:]), long)
    for platform in ("gpu", "tpu"):
        with compiling_for(platform):
            assert not cpu_attention.should_use_cpu_attention(long, long)


def test_devices_share_the_plain_form():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], ["cpu:0"])
    distribution = keras.distribution.DataParallel(device_mesh=mesh)
    with distribution.scope():
        assert not cpu_attention.should_use_cpu_attention(
            (2, 256, 4, 8), (2, 256, 4, 8)
        )
