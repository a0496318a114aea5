"""Attention on CPUs: many tokens one head at a time, one token by sums.

XLA has no fused attention on CPUs. The logits of all heads (134 MB for the
vision tower at 448 px and two rows) are written to memory and read again by
each operation, forward and backward. Those of one head are 4 MB, and stay in
the CPU cache. Measured on two cores; with many, several heads at a time might
be faster.

When one token per row attends to the key-value cache (decoding), a product
first copies the whole cache, to put heads before tokens. Sums read it as it is
stored. Milliseconds per layer and token for keys + values in float32, on two
cores with AVX2:

| rows, tokens, key-value heads, head dim | products | sums |
| --- | --- | --- |
| 16, 127, 2, 32 | 0.15 + 0.18 | 0.14 + 0.05 |
| 1, 287, 4, 256 | 0.11 + 0.21 | 0.09 + 0.08 |
| 8, 287, 4, 256 | 2.36 + 4.06 | 1.74 + 1.13 |
| 32, 287, 4, 256 | 9.94 + 16.35 | 7.21 + 3.80 |
| 4, 1040, 8, 256 | 8.34 + 9.17 | 7.60 + 3.35 |
"""

import functools

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers.cpu_products import should_use_cpu_products

# Logits per head; the vision tower has twice as many at 224 px. With fewer, as
# in decoding, the overhead of the loop exceeds the gain.
FEWEST_LOGITS = 2**15
# Added to the logits of unseen tokens. Finite, so that a fully masked row gives
# numbers and not NaN.
MASKED = -2.0e38


def should_use_cpu_attention(query_shape, key_shape):
    """Return whether attention should run one head at a time.

    Args:
        query_shape: tuple (batch, tokens, query heads, head dim).
        key_shape: tuple (batch, tokens, key-value heads, head dim).

    Returns:
        bool: `True` on the JAX backend on a CPU, if a head has many logits.
        `False` under a distribution, whose devices share rows and heads, and
        for a dynamic batch size.
    """
    return (
        platform() == "cpu"
        and keras.distribution.distribution() is None
        and isinstance(query_shape[0], int)
        and query_shape[1] * key_shape[1] >= FEWEST_LOGITS
    )


def should_use_cpu_decoding(query_shape, cached):
    """Return whether `token_logits` and `token_mix` should be used.

    Sums of 16 bits are slower than products (8 rows: 6.1 instead of 5.2 ms).

    Args:
        query_shape: tuple (batch, tokens, query heads, head dim).
        cached: tensor, keys or values.
    """
    is_wide = keras.backend.standardize_dtype(cached.dtype) in (
        "float32",
        "int8",
    )
    # The size last: in TensorFlow's graphs it may be a tensor.
    return should_use_cpu_products() and is_wide and query_shape[1] == 1


def token_logits(query_B1NH, key_BSKH):
    """Return the logits of one token per row, summed over a head.

    Args:
        query_B1NH: tensor.
        key_BSKH: float32 or int8 tensor.

    Returns:
        Float32 tensor (batch, K, N / K, 1, S).
    """
    B, _, N, H = query_B1NH.shape
    K = key_BSKH.shape[2]
    query_B1KGH = ops.reshape(query_B1NH, (B, 1, K, N // K, H))
    logits_BSKG = ops.sum(
        ops.cast(query_B1KGH, "float32")
        * ops.cast(key_BSKH, "float32")[:, :, :, None],
        axis=-1,
    )
    return ops.transpose(logits_BSKG, (0, 2, 3, 1))[:, :, :, None]


def token_mix(weights_BKG1S, value_BSKH):
    """Return the values of one token per row, summed over the cache.

    Args:
        weights_BKG1S: float tensor.
        value_BSKH: float32 or int8 tensor.

    Returns:
        Tensor (batch, 1, K, N / K, head dim), dtype of the weights.
    """
    weights_BSKG1 = ops.transpose(weights_BKG1S, (0, 4, 1, 2, 3))
    mixed_BKGH = ops.sum(
        ops.cast(weights_BSKG1, "float32")
        * ops.cast(value_BSKH, "float32")[:, :, :, None],
        axis=1,
    )
    return ops.cast(mixed_BKGH, weights_BKG1S.dtype)[:, None]


def attend_on_cpu(query_BTNH, key_BSKH, value_BSKH, mask_BTS, cap):
    """Compute `attend` for one row and key-value head at a time.

    The backward pass saves the arguments and, for each token, the largest
    logit and the sum of exponentials. It recomputes the weights, transposed,
    so that two of its three products with them read rows.

    Args:
        query_BTNH: tensor, already scaled.
        key_BSKH: tensor.
        value_BSKH: tensor.
        mask_BTS: bool tensor, True where t sees s; `None` for no mask.
        cap: float, soft cap of the logits, or `None`.

    Returns:
        Tensor (batch, tokens, query heads, head_dim), dtype of the values.

    Source: https://arxiv.org/abs/2205.14135, the backward pass in one block.
    """
    return _attention(cap)(query_BTNH, key_BSKH, value_BSKH, mask_BTS)


@functools.cache
def _attention(cap):
    """Build the function once, so that eager calls reuse its compilation."""
    import jax
    import jax.numpy as jnp

    def product(a, b, axis_of_a, axis_of_b):
        axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
        return jax.lax.dot_general(a, b, axes)

    def to_float32(*tensors):
        return [tensor.astype("float32") for tensor in tensors]

    def capped(logits):
        """Return the capped logits, and their ratio to the cap if any."""
        if cap is None:
            return logits, None
        share = jnp.tanh(logits / cap)
        return cap * share, share

    def forward_head(query_MH, _max, _sum, key_SH, value_SH, unseen_MS):
        query_MH, key_SH = to_float32(query_MH, key_SH)
        logits_MS, _ = capped(product(query_MH, key_SH, 1, 1))
        if unseen_MS is not None:
            logits_MS = logits_MS + unseen_MS
        largest_M1 = jnp.max(logits_MS, axis=-1, keepdims=True)
        weights_MS = jnp.exp(logits_MS - largest_M1)
        sum_M1 = jnp.sum(weights_MS, axis=-1, keepdims=True)
        weights_MS = (weights_MS / sum_M1).astype(value_SH.dtype)
        mixed_MH = product(weights_MS, value_SH, 1, 0)
        return mixed_MH, largest_M1[:, 0], sum_M1[:, 0]

    def backward_head(
        query_MH, key_SH, value_SH, upstream_MH, largest_M, sum_M, unseen_MS
    ):
        query_MH, key_SH = to_float32(query_MH, key_SH)
        value_SH, upstream_MH = to_float32(value_SH, upstream_MH)
        logits_SM, share_SM = capped(product(key_SH, query_MH, 1, 1))
        if unseen_MS is not None:
            logits_SM = logits_SM + unseen_MS.T
        weights_SM = jnp.exp(logits_SM - largest_M) * (1 / sum_M)
        change_SM = product(value_SH, upstream_MH, 1, 1)
        mean_M = jnp.sum(weights_SM * change_SM, axis=0)
        gradient_SM = weights_SM * (change_SM - mean_M)
        if share_SM is not None:
            gradient_SM = gradient_SM * (1 - share_SM * share_SM)
        return (
            product(gradient_SM, key_SH, 0, 0),
            product(gradient_SM, query_MH, 1, 0),
            product(weights_SM, upstream_MH, 1, 0),
        )

    def heads_first(x_BTNH, key_heads):
        """Return (B K, G T, H): the queries of a key-value head together."""
        B, T, N, H = x_BTNH.shape
        x_BTKGH = x_BTNH.reshape(B, T, key_heads, N // key_heads, H)
        return jnp.moveaxis(x_BTKGH, 1, 3).reshape(B * key_heads, -1, H)

    def heads_last(x_XMH, shape, key_heads):
        B, T, N, H = shape
        x_BKGTH = x_XMH.reshape(B, key_heads, N // key_heads, T, H)
        return jnp.moveaxis(x_BKGTH, 3, 1).reshape(shape)

    def each_head(function, mask_BTS, key_heads, groups, replaced, *others_XM):
        """Apply a function to every row and key-value head in turn.

        `replaced` are the function's first arguments, and its results
        overwrite them. Otherwise XLA would allocate arrays of zeros for all
        layers before the first layer runs.
        """

        def one(number, replaced):
            unseen_MS = None
            if mask_BTS is not None:
                unseen_TS = jnp.where(mask_BTS[number // key_heads], 0, MASKED)
                unseen_MS = jnp.tile(unseen_TS, (groups, 1))
            head = [array[number] for array in (*replaced, *others_XM)]
            found = function(*head, unseen_MS)
            return [
                array.at[number].set(new.astype(array.dtype))
                for array, new in zip(replaced, found, strict=True)
            ]

        # With a static loop length, remat "dots" would save all logits.
        count = jnp.asarray(replaced[0].shape[0])
        return jax.lax.fori_loop(0, count, one, list(replaced))

    def forward(query_BTNH, key_BSKH, value_BSKH, mask_BTS):
        K, N = key_BSKH.shape[2], query_BTNH.shape[2]
        query_XMH = heads_first(query_BTNH, K)
        none_XM = jnp.zeros(query_XMH.shape[:2], "float32")
        mixed_XMH, largest_XM, sum_XM = each_head(
            forward_head,
            mask_BTS,
            K,
            N // K,
            (query_XMH, none_XM, none_XM),
            heads_first(key_BSKH, K),
            heads_first(value_BSKH, K),
        )
        mixed_BTNH = heads_last(mixed_XMH, query_BTNH.shape, K)
        kept = (query_BTNH, key_BSKH, value_BSKH, mask_BTS)
        return mixed_BTNH, (*kept, largest_XM, sum_XM)

    def backward(kept, upstream_BTNH):
        *inputs, mask_BTS, largest_XM, sum_XM = kept
        query_BTNH, key_BSKH, _ = inputs
        K, N = key_BSKH.shape[2], query_BTNH.shape[2]
        gradients = each_head(
            backward_head,
            mask_BTS,
            K,
            N // K,
            [heads_first(array, K) for array in inputs],
            heads_first(upstream_BTNH, K),
            largest_XM,
            sum_XM,
        )
        gradients = [
            heads_last(gradient, array.shape, K)
            for gradient, array in zip(gradients, inputs, strict=True)
        ]
        # The mask has no gradient.
        return (*gradients, None)

    attention = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    attention.defvjp(forward, backward)
    return jax.jit(attention)
