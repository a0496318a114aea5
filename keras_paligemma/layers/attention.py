"""Masks, rotary positions and grouped-query attention.

The dimension key that every file here uses:

B batch, I image tokens, P prompt, R response, L = I + P + R, T query tokens,
S key and value tokens (the cache), N query heads, K key-value heads,
G = N / K query heads per key-value head, H head dim, D width, F MLP width,
V vocabulary.
"""

from typing import Any

import keras
from keras import ops

from keras_paligemma.layers import cpu_attention
from keras_paligemma.layers.cache import Int8Heads
from keras_paligemma.layers.cache import read_cache
from keras_paligemma.layers.cache import write_cache
from keras_paligemma.layers.cpu_attention import MASKED
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.remat import recompute
from keras_paligemma.layers.splash import PrefixMask
from keras_paligemma.layers.splash import attend_fused
from keras_paligemma.types import Tensor


def attention_mask(padding_mask_BL, response_mask_BL):
    """Return which token attends to which: the one mask rule of PaliGemma.

    Image and prompt tokens see each other in both directions; each response
    token sees them and the response up to itself. A token's block is the
    number of response tokens so far, and token t sees token s if and only if
    `block[s] <= block[t]` and both are valid. For two image tokens, a padding
    token, two prompt tokens and two response tokens:

    ```
                    s: i i . p p r r    block
        t: i           1 1 0 1 1 0 0      0
           i           1 1 0 1 1 0 0      0
           . padding   0 0 0 0 0 0 0      0
           p           1 1 0 1 1 0 0      0
           p           1 1 0 1 1 0 0      0
           r           1 1 0 1 1 1 0      1
           r           1 1 0 1 1 1 1      2
    ```

    Args:
        padding_mask_BL: bool tensor (batch, tokens), True on valid tokens.
        response_mask_BL: bool tensor (batch, tokens), True on the response.

    Returns:
        Bool tensor (batch, tokens, tokens): [b, t, s] is True where t sees s.

    Example:
        >>> valid = ops.ones((1, 3), "bool")
        >>> response = ops.array([[False, True, True]])
        >>> print(ops.convert_to_numpy(attention_mask(valid, response))[0])
        [[ True False False]
         [ True  True False]
         [ True  True  True]]

    Source: big_vision `models/proj/paligemma/paligemma.py`, `make_attn_mask`.
    """
    block_BL = ops.cumsum(ops.cast(response_mask_BL, "int32"), axis=-1)
    valid_BL = ops.cast(padding_mask_BL, "bool")
    return ops.logical_and(
        block_BL[:, None, :] <= block_BL[:, :, None],
        ops.logical_and(valid_BL[:, None, :], valid_BL[:, :, None]),
    )


def mask_of_block(number, mask_BTS, near_mask_BTS):
    """Return a block's mask if every other block, from the first, sees near.

    Args:
        number: int or scalar int tensor, index of the block.
        mask_BTS: bool tensor.
        near_mask_BTS: bool tensor, the part of `mask_BTS` within the window.

    Returns:
        Bool tensor (batch, tokens, cached tokens).
    """
    # Not `where`, which ONNX Runtime lacks for booleans.
    is_wide = number % 2 == 1
    return ops.logical_or(near_mask_BTS, ops.logical_and(mask_BTS, is_wide))


def token_positions(padding_mask_BL):
    """Count the valid tokens before each token: its rotary position.

    Padding takes no position, so a row's numbers do not depend on where its
    padding lies.

    Args:
        padding_mask_BL: bool tensor (batch, tokens), True on valid tokens.

    Returns:
        Int32 tensor (batch, tokens); padding repeats its predecessor's.
    """
    count_BL = ops.cumsum(ops.cast(padding_mask_BL, "int32"), axis=-1)
    return ops.maximum(count_BL - 1, 0)


def rotary_angles(positions_BT, head_dim, base=10_000.0):
    """Return the cosines and sines that rotate a head at each position.

    Computed once per forward pass, in float32, and shared by all blocks.

    Args:
        positions_BT: int tensor (batch, tokens).
        head_dim: int, size of a head; even.
        base: float, ratio of the longest to the shortest wavelength.

    Returns:
        Two float32 tensors (batch, tokens, 1, head_dim / 2): cosine, sine.

    Source: RoFormer, https://arxiv.org/abs/2104.09864.
    """
    half = head_dim // 2
    exponent_H = ops.arange(half, dtype="float32") / half
    frequency_H = ops.power(ops.cast(base, "float32"), -exponent_H)
    angle_BT1H = ops.cast(positions_BT, "float32")[..., None, None]
    angle_BT1H = angle_BT1H * frequency_H
    return ops.cos(angle_BT1H), ops.sin(angle_BT1H)


def rotate(x_BTNH, angles):
    """Rotate the first half of each head against its second half.

    Args:
        x_BTNH: tensor (batch, tokens, heads, head_dim).
        angles: result of `rotary_angles`.

    Returns:
        Tensor of the shape and dtype of `x_BTNH`; computed in float32.
    """
    cosine, sine = angles
    first, second = ops.split(ops.cast(x_BTNH, "float32"), 2, axis=-1)
    rotated = ops.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine],
        axis=-1,
    )
    return ops.cast(rotated, x_BTNH.dtype)


def soft_cap(x, cap):
    """Return `cap * tanh(x / cap)`, or `x` if `cap` is `None`."""
    return x if cap is None else cap * ops.tanh(x / cap)


def attend(query_BTNH, key_BSKH, value_BSKH, mask_BTS=None, cap=None):
    """Compute grouped-query attention with a soft cap on the logits.

    Query head n reads key-value head n // (N / K): no key is repeated in
    memory. Products, cap and softmax are in float32 whatever the inputs. The
    backward pass recomputes the weights (`recompute`), and JAX on a CPU
    processes one head at a time (`cpu_attention`).

    Args:
        query_BTNH: tensor, already scaled.
        key_BSKH: tensor, or `Int8Heads` of a cache.
        value_BSKH: as `key_BSKH`.
        mask_BTS: bool tensor, True where t sees s; `None` for no mask.
        cap: float, soft cap of the logits, or `None`.

    Returns:
        Tensor (batch, tokens, query heads, head_dim), dtype of the values, or
        of the queries beside `Int8Heads`.
    """
    if isinstance(key_BSKH, Int8Heads):
        return _mix_int8(query_BTNH, key_BSKH, value_BSKH, mask_BTS, cap)
    if cpu_attention.should_use_cpu_attention(
        ops.shape(query_BTNH), ops.shape(key_BSKH)
    ):
        return cpu_attention.attend_on_cpu(
            query_BTNH, key_BSKH, value_BSKH, mask_BTS, cap
        )

    def mix(query_BTNH, key_BSKH, value_BSKH, mask_BTS):
        return _mix(query_BTNH, key_BSKH, value_BSKH, mask_BTS, cap)

    return recompute(mix)(query_BTNH, key_BSKH, value_BSKH, mask_BTS)


def _mix(query_BTNH, key_BSKH, value_BSKH, mask_BTS, cap):
    logits_BKGTS = _logits(query_BTNH, key_BSKH)
    weights_BKGTS = _weights(logits_BKGTS, mask_BTS, cap)
    weights_BKGTS = ops.cast(weights_BKGTS, value_BSKH.dtype)
    return _mixed(weights_BKGTS, value_BSKH, ops.shape(query_BTNH))


def _mix_int8(query_BTNH, keys, values, mask_BTS, cap):
    """Attend to int8 keys and values without a float copy of them.

    A token's scale multiplies its logit and its weight, not its whole head.
    """

    def each_logit(scales_BSK1):
        return ops.transpose(scales_BSK1, (0, 2, 3, 1))[:, :, None]

    logits_BKGTS = _logits(query_BTNH, keys.codes) * each_logit(keys.scales)
    weights_BKGTS = _weights(logits_BKGTS, mask_BTS, cap)
    weights_BKGTS = weights_BKGTS * each_logit(values.scales)
    weights_BKGTS = ops.cast(weights_BKGTS, query_BTNH.dtype)
    return _mixed(weights_BKGTS, values.codes, ops.shape(query_BTNH))


def _logits(query_BTNH, key_BSKH):
    """Return the float32 logits (B, K, G, T, S) before the cap."""
    if cpu_attention.should_use_cpu_decoding(query_BTNH.shape, key_BSKH):
        return cpu_attention.token_logits(query_BTNH, key_BSKH)
    B, T, N, H = ops.shape(query_BTNH)
    K = key_BSKH.shape[2]
    query_BTKGH = ops.reshape(query_BTNH, (B, T, K, N // K, H))
    return ops.einsum(
        "btkgh,bskh->bkgts",
        ops.cast(query_BTKGH, "float32"),
        ops.cast(key_BSKH, "float32"),
    )


def _mixed(weights_BKGTS, value_BSKH, shape_BTNH):
    """Return the weighted sums of the values, in the dtype of the weights."""
    if cpu_attention.should_use_cpu_decoding(shape_BTNH, value_BSKH):
        mixed_BTKGH = cpu_attention.token_mix(weights_BKGTS, value_BSKH)
    else:
        mixed_BTKGH = ops.einsum(
            "bkgts,bskh->btkgh",
            weights_BKGTS,
            ops.cast(value_BSKH, weights_BKGTS.dtype),
        )
    return ops.reshape(mixed_BTKGH, shape_BTNH)


def _weights(logits_BKGTS, mask_BTS, cap):
    """Return the attention weights of logits: cap, mask and softmax."""
    logits_BKGTS = soft_cap(logits_BKGTS, cap)
    if mask_BTS is not None:
        # Added, which rounds to MASKED: `ops.where` would hold a constant of
        # the size of the logits, 324 MiB for 3b at 448 px and 8 rows.
        unseen_BTS = ops.cast(ops.logical_not(mask_BTS), "float32") * MASKED
        logits_BKGTS = logits_BKGTS + unseen_BTS[:, None, None]
    return ops.softmax(logits_BKGTS, axis=-1)


class GroupedQueryAttention(keras.layers.Layer):
    """Attention with rotary positions, soft cap and shared key-value heads.

    Used by both towers: Gemma 2, and SigLIP with as many key-value heads as
    query heads and no rotary angles.

    Args:
        hidden_dim: int, width D of the tokens.
        num_query_heads: int N.
        num_key_value_heads: int K, a divisor of N.
        head_dim: int H.
        query_scale: float, multiplies the queries.
        logit_soft_cap: float or `None`.
        use_bias: bool, biases on all four projections (SigLIP has them).
        quantization: storage of the kernels, see `Projection`.

    Source: Gemma 2, https://arxiv.org/abs/2408.00118.
    """

    def __init__(
        self,
        hidden_dim,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        query_scale,
        logit_soft_cap=None,
        use_bias=False,
        quantization=None,
        **kwargs,
    ):
        # Keras would cast the rotary angles, which need float32.
        super().__init__(autocast=False, **kwargs)
        self.query_scale = query_scale
        self.logit_soft_cap = logit_soft_cap
        query_shape = (num_query_heads, head_dim)
        key_shape = (num_key_value_heads, head_dim)

        def projection(name, input_shape, output_shape):
            return Projection(
                input_shape,
                output_shape,
                use_bias=use_bias,
                quantization=quantization,
                dtype=self.dtype_policy,
                name=name,
            )

        self.query = projection("query", (hidden_dim,), query_shape)
        self.key = projection("key", (hidden_dim,), key_shape)
        self.value = projection("value", (hidden_dim,), key_shape)
        self.output_projection = projection(
            "output", query_shape, (hidden_dim,)
        )

    def build(self, input_shape=None):
        for layer in (self.query, self.key, self.value, self.output_projection):
            layer.build()
        self.built = True

    def call(
        self,
        x_BTD: Tensor,
        mask_BTS: Tensor = None,
        angles: Tensor = None,
        cache: tuple | None = None,
        index: Tensor = None,
        last: int | None = None,
    ) -> Any:
        key_BSKH = self.key(x_BTD)
        value_BSKH = self.value(x_BTD)
        tokens = x_BTD.shape[1]
        if angles is not None:
            key_BSKH = rotate(key_BSKH, angles)
        fused = isinstance(mask_BTS, PrefixMask)
        if last is not None and not fused:
            x_BTD, mask_BTS = x_BTD[:, -last:], mask_BTS[:, -last:]
            angles = angles and tuple(table[:, -last:] for table in angles)
        query_BTNH = self.query(x_BTD)
        if angles is not None:
            query_BTNH = rotate(query_BTNH, angles)
        query_BTNH = query_BTNH * ops.cast(self.query_scale, query_BTNH.dtype)
        if cache is not None:
            cache = write_cache(cache, key_BSKH, value_BSKH, index)
            # A prefill's mask covers its own tokens only. The cache, whose
            # end is still empty, is not read back.
            is_prefill = (
                isinstance(mask_BTS, PrefixMask) or mask_BTS.shape[-1] == tokens
            )
            if not is_prefill:
                key_BSKH, value_BSKH = read_cache(cache)
        mixed_BTNH = (attend_fused if fused else attend)(
            query_BTNH, key_BSKH, value_BSKH, mask_BTS, self.logit_soft_cap
        )
        if last is not None:
            mixed_BTNH = mixed_BTNH[:, -last:]
        output_BTD = self.output_projection(mixed_BTNH)
        return output_BTD if cache is None else (output_BTD, cache)
