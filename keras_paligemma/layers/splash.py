"""Fused attention on TPUs: no tensor of all logits, forward or backward.

JAX's splash attention takes a mask that is known when a program is compiled.
The layout of the tokens is known then, so the kernel skips blocks that no token
sees.
"""

import functools
from typing import NamedTuple

import keras

from keras_paligemma.compat import platform

# Lanes of a TPU's vector unit: block sizes and head_dim are multiples of this.
LANES = 128
# The logits of a block and their gradients must fit into VMEM.
LARGEST_BLOCK = 512


class PrefixMask(NamedTuple):
    """The prefix mask in two parts, with a static start of the response.

    Replaces the mask of `attention_mask` in training and prefill. Valid prefix
    tokens see the prefix; valid response tokens see the prefix and the
    response up to themselves.

    Args:
        prefix_BP: bool tensor, True on valid image and prompt tokens.
        response_BR: bool tensor, True on valid tokens of the response; R may
            be 0.
    """

    prefix_BP: object
    response_BR: object


def should_use_splash(batch_size, num_key_value_heads, head_dim):
    """Return whether to use fused attention.

    Args:
        batch_size: int, rows on all devices together; `None` if unknown.
        num_key_value_heads: int K.
        head_dim: int H.

    Returns:
        bool: `True` on the JAX backend on a TPU, if H is a multiple of 128
        and rows and heads divide evenly among the devices of an active
        distribution.
    """
    if platform() != "tpu" or head_dim % LANES:
        return False
    active = keras.distribution.distribution()
    if active is None:
        return True
    if not batch_size or batch_size % active.num_model_replicas:
        return False
    mesh, rows, heads = _axes(active, batch_size)
    return num_key_value_heads % (mesh.shape[heads] if heads else 1) == 0


def attend_fused(
    query_BTNH, key_BTKH, value_BTKH, mask, cap=None, interpret=False
):
    """Compute `attend` for a `PrefixMask` in a TPU kernel.

    The compiler cannot partition a Pallas kernel: under a distribution,
    `shard_map` passes each device its rows, and its heads if they are sharded.
    Padding is a separate segment: it sees other padding only.

    Args:
        query_BTNH: tensor, already scaled; T = P + R.
        key_BTKH: tensor.
        value_BTKH: tensor.
        mask: `PrefixMask`.
        cap: float, soft cap of the logits, or `None`.
        interpret: bool, interpret the kernel, which works on any device.

    Returns:
        Tensor (batch, tokens, query heads, head_dim), dtype of the values.

    Source: FlashAttention, https://arxiv.org/abs/2205.14135, as implemented in
        JAX's splash attention.
    """
    import jax
    import jax.numpy as jnp

    attend_here = functools.partial(
        _attend,
        prefix_length=mask.prefix_BP.shape[1],
        cap=cap,
        interpret=interpret,
    )
    segments_BT = jnp.concatenate(mask, axis=1).astype("int32")
    tensors = (query_BTNH, key_BTKH, value_BTKH, segments_BT)
    active = keras.distribution.distribution()
    if active is None:
        return attend_here(*tensors)
    mesh, rows, heads = _axes(active, query_BTNH.shape[0])
    part = jax.sharding.PartitionSpec(rows, None, heads)
    return jax.shard_map(
        attend_here,
        mesh=mesh,
        in_specs=(part, part, part, jax.sharding.PartitionSpec(rows)),
        out_specs=part,
        # A kernel does not declare the axes along which its results vary.
        check_vma=False,
    )(*tensors)


def _axes(active, batch_size):
    """Return a distribution's mesh and its axes for rows and for heads."""
    layout = active.get_data_layout((batch_size, 1)).backend_layout
    rows = layout.spec[0]
    used = rows if isinstance(rows, tuple) else (rows,)
    heads = "model" in layout.mesh.axis_names and "model" not in used
    return layout.mesh, rows, "model" if heads else None


def _attend(
    query_BTNH,
    key_BTKH,
    value_BTKH,
    segments_BT,
    prefix_length,
    cap,
    interpret,
):
    """Attend on one device; the kernel takes one row, heads first."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tokens, num_heads = query_BTNH.shape[1:3]
    length = -(-tokens // LANES) * LANES
    more = length - tokens
    # Tokens that pad the length to a multiple are a third segment.
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=2)

    def heads_first(x_BTNH):
        x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, more), (0, 0), (0, 0)))
        return jnp.swapaxes(x_BTNH, 1, 2)

    place = np.arange(length)
    seen_TS = (place < prefix_length) | (place <= place[:, None])
    block = _block(length)
    kernel = splash.make_splash_mha_single_device(
        np.broadcast_to(seen_TS, (num_heads, length, length)),
        attn_logits_soft_cap=cap,
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    mixed_BNTH = jax.vmap(kernel)(
        heads_first(query_BTNH),
        heads_first(key_BTKH),
        heads_first(value_BTKH),
        splash.SegmentIds(segments_BT, segments_BT),
    )
    # JAX's return type includes that of a call with residuals.
    mixed_BTNH = jnp.swapaxes(mixed_BNTH, 1, 2)  # pyright: ignore[reportArgumentType]
    return mixed_BTNH[:, :tokens]


def _block(length):
    """Return the largest multiple of the lanes that divides `length`."""
    parts = range(LARGEST_BLOCK, 0, -LANES)
    return next(part for part in parts if length % part == 0)
