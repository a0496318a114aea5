"""The blocks of both towers: each an ordinary Keras layer."""

from typing import Any

import keras
from keras import ops

from keras_paligemma.layers.attention import GroupedQueryAttention
from keras_paligemma.layers.attention import mask_of_block
from keras_paligemma.layers.dropout import drop
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.remat import recompute
from keras_paligemma.types import Tensor


class RMSNorm(keras.layers.Layer):
    """Normalize by the root mean square, times (1 + scale), in float32.

    The scale is stored around zero, as the published weights are: storing
    1 + scale in bfloat16 would cost up to 0.39 %.

    Args:
        dim: int, size of the last axis.
        epsilon: float.

    Source: https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, dim, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.epsilon = epsilon

    def build(self, input_shape=None):
        self.scale = self.add_weight(
            shape=(self.dim,),
            initializer="zeros",
            autocast=False,
            name="scale",
        )
        self.built = True

    def call(self, x_BTD):
        x = ops.cast(x_BTD, "float32")
        mean = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = x * ops.rsqrt(mean + self.epsilon)
        x = x * (1.0 + ops.cast(self.scale, "float32"))
        return ops.cast(x, x_BTD.dtype)


class LayerNorm(keras.layers.LayerNormalization):
    """LayerNormalization, rematerialised: only its inputs are saved.

    XLA:CPU would save mean and scale for the backward pass too, each as large
    as the input.
    """

    def call(self, x_BTD):
        def normalize(x_BTD, scale_D, offset_D):
            return ops.layer_normalization(
                x_BTD, scale_D, offset_D, self.axis, self.epsilon
            )

        x_BTD = recompute(normalize)(
            x_BTD,
            ops.convert_to_tensor(self.gamma),
            ops.convert_to_tensor(self.beta),
        )
        return ops.cast(x_BTD, self.compute_dtype)


class GatedMLP(keras.layers.Layer):
    """Gemma's feed-forward part: `down(gelu(gate(x)) * up(x))`, no biases.

    Args:
        hidden_dim: int D.
        intermediate_dim: int F, the width of `gate` and of `up`.
        quantization: storage of the kernels, see `Projection`.
    """

    def __init__(
        self, hidden_dim, intermediate_dim, quantization=None, **kwargs
    ):
        super().__init__(**kwargs)
        wide, narrow = (intermediate_dim,), (hidden_dim,)
        same = {"quantization": quantization, "dtype": self.dtype_policy}
        self.gate = Projection(narrow, wide, name="gate", **same)
        self.up = Projection(narrow, wide, name="up", **same)
        self.down = Projection(wide, narrow, name="down", **same)

    def build(self, input_shape=None):
        for layer in (self.gate, self.up, self.down):
            layer.build()
        self.built = True

    def call(self, x_BTD):
        gated = recompute(lambda gate, up: _gelu(gate) * up)
        return self.down(gated(self.gate(x_BTD), self.up(x_BTD)))


class MLP(keras.layers.Layer):
    """SigLIP's feed-forward part: `down(gelu(up(x)))`, with biases.

    Args:
        hidden_dim: int D.
        intermediate_dim: int F.
        quantization: storage of the kernels, see `Projection`.
    """

    def __init__(
        self, hidden_dim, intermediate_dim, quantization=None, **kwargs
    ):
        super().__init__(**kwargs)
        wide, narrow = (intermediate_dim,), (hidden_dim,)
        same = {
            "use_bias": True,
            "quantization": quantization,
            "dtype": self.dtype_policy,
        }
        self.up = Projection(narrow, wide, name="up", **same)
        self.down = Projection(wide, narrow, name="down", **same)

    def build(self, input_shape=None):
        self.up.build()
        self.down.build()
        self.built = True

    def call(self, x_BTD):
        return self.down(recompute(_gelu)(self.up(x_BTD)))


def _gelu(x):
    return ops.gelu(x, approximate=True)


class DecoderBlock(keras.layers.Layer):
    """One block of Gemma 2, or of Gemma with `use_post_norms=False`.

    Args:
        hidden_dim: int D.
        intermediate_dim: int F.
        num_query_heads: int N.
        num_key_value_heads: int K.
        head_dim: int H.
        query_scale: float.
        logit_soft_cap: float or `None`, cap of the attention logits.
        use_post_norms: bool, norms after attention and MLP (Gemma 2).
        epsilon: float, added to the variance in the norms.
        dropout: float, dropout rate of the outputs of attention and MLP in
            training; needs a seed, see `layers.dropout`.
        quantization: storage of the kernels, see `Projection`.

    Call arguments:
        x_BTD: tensor.
        mask_BTS: bool tensor.
        angles: tuple, the result of `rotary_angles`.
        near_mask_BTS: bool tensor or `None`, the mask of every other block.
        number: int, index of this block; used with `near_mask_BTS` only.
        cache: `None`, or a cache as `write_cache` describes it.
        index: int, first cache position to write.
        last: int or `None`, number of tokens at the end that are returned;
            for the others only keys and values are computed.

    Returns:
        Tensor like `x_BTD`, or its last tokens; with a cache, the tensor and
        the cache.
    """

    def __init__(
        self,
        hidden_dim,
        intermediate_dim,
        num_query_heads,
        num_key_value_heads,
        head_dim,
        query_scale,
        logit_soft_cap=None,
        use_post_norms=True,
        epsilon=1e-6,
        dropout=0.0,
        quantization=None,
        **kwargs,
    ):
        # Keeps the rotary angles in float32, as the attention does.
        super().__init__(autocast=False, **kwargs)
        policy = self.dtype_policy

        def norm(name):
            return RMSNorm(hidden_dim, epsilon, dtype=policy, name=name)

        self.pre_attention_norm = norm("pre_attention_norm")
        self.attention = GroupedQueryAttention(
            hidden_dim,
            num_query_heads,
            num_key_value_heads,
            head_dim,
            query_scale,
            logit_soft_cap,
            quantization=quantization,
            dtype=policy,
            name="attention",
        )
        self.pre_ffw_norm = norm("pre_ffw_norm")
        self.mlp = GatedMLP(
            hidden_dim,
            intermediate_dim,
            quantization,
            dtype=policy,
            name="mlp",
        )
        self.dropout = dropout
        self.use_post_norms = use_post_norms
        if use_post_norms:
            self.post_attention_norm = norm("post_attention_norm")
            self.post_ffw_norm = norm("post_ffw_norm")

    def build(self, input_shape=None):
        for layer in (
            self.pre_attention_norm,
            self.attention,
            self.pre_ffw_norm,
            self.mlp,
        ):
            layer.build()
        if self.use_post_norms:
            self.post_attention_norm.build()
            self.post_ffw_norm.build()
        self.built = True

    def call(
        self,
        x_BTD: Tensor,
        mask_BTS: Tensor,
        angles: Tensor,
        near_mask_BTS: Tensor = None,
        number: Tensor = None,
        cache: tuple | None = None,
        index: Tensor = None,
        last: int | None = None,
    ) -> Any:
        if near_mask_BTS is not None:
            mask_BTS = mask_of_block(number, mask_BTS, near_mask_BTS)
        y_BTD = self.pre_attention_norm(x_BTD)
        y_BTD = self.attention(
            y_BTD, mask_BTS, angles, cache=cache, index=index, last=last
        )
        if last is not None:
            x_BTD = x_BTD[:, -last:]
        if cache is not None:
            y_BTD, cache = y_BTD
        if self.use_post_norms:
            y_BTD = self.post_attention_norm(y_BTD)
        x_BTD = x_BTD + drop(y_BTD, self.dropout, "attention")
        y_BTD = self.mlp(self.pre_ffw_norm(x_BTD))
        y_BTD = drop(y_BTD, self.dropout, "mlp")
        if self.use_post_norms:
            y_BTD = self.post_ffw_norm(y_BTD)
        x_BTD = x_BTD + y_BTD
        return x_BTD if cache is None else (x_BTD, cache)


class EncoderBlock(keras.layers.Layer):
    """One block of SigLIP's vision transformer: norms first, biases, no mask.

    Args:
        hidden_dim: int D.
        intermediate_dim: int F.
        num_heads: int, a divisor of D.
        epsilon: float, added to the variance in the norms.
        quantization: storage of the kernels, see `Projection`.
    """

    def __init__(
        self,
        hidden_dim,
        intermediate_dim,
        num_heads,
        epsilon=1e-6,
        quantization=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        policy = self.dtype_policy
        head_dim = hidden_dim // num_heads

        def norm(name):
            return LayerNorm(epsilon=epsilon, dtype=policy, name=name)

        self.attention_norm = norm("attention_norm")
        self.attention = GroupedQueryAttention(
            hidden_dim,
            num_heads,
            num_heads,
            head_dim,
            query_scale=head_dim**-0.5,
            use_bias=True,
            quantization=quantization,
            dtype=policy,
            name="attention",
        )
        self.mlp_norm = norm("mlp_norm")
        self.mlp = MLP(
            hidden_dim,
            intermediate_dim,
            quantization,
            dtype=policy,
            name="mlp",
        )
        self.hidden_dim = hidden_dim

    def build(self, input_shape=None):
        for norm in (self.attention_norm, self.mlp_norm):
            norm.build((None, None, self.hidden_dim))
        self.attention.build()
        self.mlp.build()
        self.built = True

    def call(self, x_BTD):
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
