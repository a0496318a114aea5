"""Attention on random tensors: the plain form and the interpreted kernel."""

import numpy as np

from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.splash import PrefixMask
from keras_paligemma.layers.splash import attend_fused

PREFIX, RESPONSE = 100, 50


def draw_attention(heads=4, key_heads=2, head_dim=128, batch=2):
    """Draw tensors with padding and with logits far beyond the cap."""
    random = np.random.default_rng(0)
    tokens = PREFIX + RESPONSE
    query, upstream = random.normal(size=(2, batch, tokens, heads, head_dim))
    key, value = random.normal(size=(2, batch, tokens, key_heads, head_dim))
    valid = random.random((batch, tokens)) > 0.2
    # One row has padding at random places, and one as from the preprocessor.
    valid[1] = True
    valid[1, 60:75] = valid[1, -20:] = False
    arrays = [
        array.astype("float32") for array in (query, key, value, upstream)
    ]
    # Padding has no gradient, as with a loss.
    arrays[3] *= valid[:, :, None, None]
    return arrays, valid


def plain(valid, cap):
    """Return a function of tensors: attention over all logits at once."""
    response = np.zeros_like(valid)
    response[:, PREFIX:] = True
    mask = attention_mask(valid, response)
    return lambda *inputs: attend(*inputs, mask, cap)


def fused(valid, cap, prefix=PREFIX):
    """Return a function of tensors: the kernel, run in its interpreter."""
    mask = PrefixMask(valid[:, :prefix], valid[:, prefix:])
    return lambda *inputs: attend_fused(*inputs, mask, cap, interpret=True)
