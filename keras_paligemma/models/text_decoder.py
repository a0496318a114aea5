"""Gemma 2: token embedding, decoder blocks and the tied head."""

from dataclasses import dataclass

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.attention import rotary_angles
from keras_paligemma.layers.attention import soft_cap
from keras_paligemma.layers.blocks import DecoderBlock
from keras_paligemma.layers.blocks import RMSNorm
from keras_paligemma.layers.cpu_products import product
from keras_paligemma.layers.cpu_products import should_use_cpu_products
from keras_paligemma.layers.cpu_products import take_rows
from keras_paligemma.layers.projection import normal
from keras_paligemma.layers.splash import PrefixMask
from keras_paligemma.layers.splash import should_use_splash
from keras_paligemma.layers.stack import LayerStack
from keras_paligemma.quantization.products import quantized_gradient
from keras_paligemma.quantization.products import quantized_product
from keras_paligemma.quantization.storage import QuantizedFormat
from keras_paligemma.quantization.storage import add_quantized_weight
from keras_paligemma.quantization.storage import table_mode


class TokenEmbedding(keras.layers.Layer):
    """The embedding table, which is also the head.

    Args:
        vocabulary_size: int V.
        hidden_dim: int D.
        quantization: storage of the table, see `Projection`.
        logit_soft_cap: float or `None`, the soft cap of a reversed call.

    Call arguments:
        inputs: int tensor of ids; reversed, float tensor (..., D).
        reverse: bool, whether to return logits instead of embeddings.
        capped: bool, whether to apply the soft cap to logits.

    Returns:
        Tensor (..., D): rows of the table times √D; reversed, float32 logits
        (..., V).
    """

    def __init__(
        self,
        vocabulary_size,
        hidden_dim,
        quantization=None,
        logit_soft_cap=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.hidden_dim = hidden_dim
        self.adapter_head = None
        self.logit_soft_cap = logit_soft_cap
        self.quantized_format = None
        if quantization is not None:
            shape = (vocabulary_size, hidden_dim)
            self.quantized_format = QuantizedFormat(quantization, shape, (1,))

    def build(self, input_shape=None):
        if self.quantized_format is not None:
            self.table, self.table_scale = add_quantized_weight(
                self, self.quantized_format, normal(self.hidden_dim), "table"
            )
        else:
            self.table = self.add_weight(
                shape=(self.vocabulary_size, self.hidden_dim),
                initializer=normal(self.hidden_dim),
                autocast=False,
                name="table",
            )
        self.built = True

    def call(self, inputs, reverse=False, capped=True):
        if reverse:
            return self.head(capped)(inputs)
        if self.quantized_format is not None:
            x_BTD = self._dequantized_rows(self.quantized_format, inputs)
        elif should_use_cpu_products():
            x_BTD = take_rows(self.table, inputs)
        else:
            x_BTD = ops.take(self.table, inputs, axis=0)
        # The scale is rounded to the table's dtype, as in the original: in
        # bfloat16 it is 48 for 3b, 59.75 for 10b and 68 for 28b.
        x_BTD = x_BTD * ops.cast(self.hidden_dim**0.5, x_BTD.dtype)
        return ops.cast(x_BTD, self.compute_dtype)

    def _dequantized_rows(self, layout, ids_BT):
        """Return rows of the quantised table, as floats."""
        alone = platform() == "tpu" and tuple(ids_BT.shape) == (1, 1)
        if alone:
            # For a single row, a TPU uses a slice, and converts the whole table
            # to another layout at each token of a loop. Two rows are gathered.
            ids_BT = ops.repeat(ids_BT, 2, axis=1)
        stored, scale = (
            ops.take(array, ids_BT, axis=0)
            for array in (self.table, self.table_scale)
        )
        x_BTD = layout.dequantize(stored, scale, self.variable_dtype)
        return x_BTD[:, :1] if alone else x_BTD

    def add_head(self):
        """Create and return a table for the heads of adapters."""
        self._tracker.unlock()
        self.adapter_head = self.add_weight(
            shape=self.table.shape,
            initializer="zeros",
            dtype=self.table.dtype,
            trainable=False,
            autocast=False,
            name="adapter_head",
        )
        self._tracker.lock()
        return self.adapter_head

    @property
    def head_table(self):
        """The head's table: the embedding's, unless an adapter has its own."""
        return self.table if self.adapter_head is None else self.adapter_head

    def head(self, capped=True):
        """Return the tied `Head`, with or without the final soft cap."""
        return Head(self, self.logit_soft_cap if capped else None)

    def logits(self, hidden_states_BTD):
        """Multiply by the table: float32 logits before the soft cap."""
        if self.quantized_format is not None:
            logits_BTV = quantized_product(
                self.quantized_format,
                self.table,
                self.table_scale,
                hidden_states_BTD,
            )
        elif should_use_cpu_products():
            table = ops.convert_to_tensor(self.head_table)
            logits_BTV = product(table, hidden_states_BTD, (self.hidden_dim,))
        else:
            table = ops.cast(self.head_table, hidden_states_BTD.dtype)
            # Not a matmul with the transpose: a loop over tokens would keep
            # the transpose as a second table, 1.0 GiB of a 3b on a v5e.
            logits_BTV = ops.tensordot(
                hidden_states_BTD, table, axes=[[-1], [1]]
            )
        return ops.cast(logits_BTV, "float32")

    def gradient_of_logits(self, gradient_BTV, dtype):
        """Backpropagate a gradient of `logits` to the hidden states."""
        gradient_BTV = ops.cast(gradient_BTV, dtype)
        if self.quantized_format is None:
            table = ops.cast(self.head_table, dtype)
            return ops.tensordot(gradient_BTV, table, axes=[[-1], [0]])
        return quantized_gradient(
            self.quantized_format, self.table, self.table_scale, gradient_BTV
        )


@dataclass(frozen=True)
class Head:
    """The tied head: hidden states to float32 logits, and gradients back.

    Args:
        embedding: `TokenEmbedding`.
        cap: float or `None`, the soft cap of the logits.
    """

    embedding: TokenEmbedding
    cap: float | None

    def __call__(self, hidden_states_BTD):
        return soft_cap(self.embedding.logits(hidden_states_BTD), self.cap)

    @property
    def frozen(self):
        """Whether only the gradient of the hidden states is needed."""
        return not self.embedding.head_table.trainable

    @property
    def trained(self):
        """The variables that need a gradient."""
        return [] if self.frozen else [self.embedding.head_table]

    def gradient(self, logits_BTV, gradient_BTV, dtype):
        """Backpropagate a gradient of the logits to the hidden states."""
        if self.cap is not None:
            gradient_BTV *= 1 - ops.square(logits_BTV / self.cap)
        return self.embedding.gradient_of_logits(gradient_BTV, dtype)


class TextDecoder(keras.layers.Layer):
    """Gemma 2 on embedded tokens, of text and images alike.

    Args:
        config: `TextDecoderConfig`.
        form: form of repetition, see `LayerStack`.
        remat: see `LayerStack`.
        quantization: storage of table and kernels, see `Projection`.
        dropout: float, see `DecoderBlock`.

    Call arguments:
        x_BTD: tensor of embeddings.
        mask_BTS: bool tensor, True where t attends to s; or from `mask_of`.
        positions_BT: int tensor, rotary positions of the tokens.
        cache: `None`, or from `make_cache`.
        index: position at which the cache is written.
        positions_BS: int tensor, the positions of the cached tokens; only
            needed by a sliding window with a cache.
        last: int or `None`, see `LayerStack`.

    Returns:
        Hidden states after the final norm; with a cache, these and the cache.
    """

    def __init__(
        self,
        config,
        form="auto",
        remat=None,
        quantization=None,
        dropout=0.0,
        **kwargs,
    ):
        # Keras would cast the scales of an int8 cache, float32 for precision.
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.dropout = dropout
        policy = self.dtype_policy
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            table_mode(quantization, config.hidden_dim),
            config.final_logit_soft_cap,
            dtype=policy,
            name="token_embedding",
        )
        self.blocks = LayerStack(
            lambda: DecoderBlock(
                hidden_dim=config.hidden_dim,
                intermediate_dim=config.intermediate_dim,
                num_query_heads=config.num_query_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                query_scale=config.query_scale(),
                logit_soft_cap=config.attention_logit_soft_cap,
                use_post_norms=config.use_post_norms,
                epsilon=config.rms_norm_epsilon,
                dropout=dropout,
                quantization=quantization,
                dtype=policy,
                name="block",
            ),
            config.num_layers,
            form,
            remat,
            numbered=config.sliding_window_size is not None,
            dtype=policy,
            name="blocks",
        )
        self.final_norm = RMSNorm(
            config.hidden_dim,
            config.rms_norm_epsilon,
            dtype=policy,
            name="final_norm",
        )

    def build(self, input_shape=None):
        self.token_embedding.build()
        self.blocks.build()
        self.final_norm.build()
        if self.dropout:
            self.blocks.enable_dropout()
        self.built = True

    def make_cache(self, batch_size, length, dtype=None):
        """Allocate an empty key-value cache.

        Args:
            batch_size: int.
            length: int, capacity in tokens, image tokens included.
            dtype: "int8", or `None` for the compute dtype.

        Returns:
            Nest of arrays.
        """
        shape = (
            batch_size,
            length,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )
        return self.blocks.make_cache(shape, dtype or self.compute_dtype)

    def mask_of(self, valid_BT, response_BT, response_length=None):
        """Return the mask in the form that attention takes here.

        Args:
            valid_BT: bool tensor, True on valid tokens.
            response_BT: bool tensor, True on response tokens.
            response_length: int, number of tokens at the end that are the
                response and nothing else; `None` if not known.

        Returns:
            `PrefixMask`, if the response's position is known and attention
            runs as one kernel (see `layers.splash.should_use_splash`; there
            is no kernel for a sliding window); else from `attention_mask`.
        """
        config = self.config
        sizes = config.num_key_value_heads, config.head_dim
        if (
            response_length is not None
            and config.sliding_window_size is None
            and should_use_splash(valid_BT.shape[0], *sizes)
        ):
            prefix = valid_BT.shape[1] - response_length
            return PrefixMask(valid_BT[:, :prefix], valid_BT[:, prefix:])
        return attention_mask(valid_BT, response_BT)

    def call(
        self,
        x_BTD,
        mask_BTS,
        positions_BT,
        cache=None,
        index=None,
        positions_BS=None,
        last=None,
    ):
        x_BTD = ops.cast(x_BTD, self.compute_dtype)
        args = self.arguments_of_blocks(mask_BTS, positions_BT, positions_BS)
        x_BTD = self.blocks(x_BTD, *args, cache=cache, index=index, last=last)
        if cache is None:
            return self.final_norm(x_BTD)
        x_BTD, cache = x_BTD
        return self.final_norm(x_BTD), cache

    def arguments_of_blocks(self, mask_BTS, positions_BT, positions_BS=None):
        """Return a block's arguments besides the tokens; see `call`."""
        angles = rotary_angles(
            positions_BT, self.config.head_dim, self.config.rope_base
        )
        window = self.config.sliding_window_size
        if window is None:
            return mask_BTS, angles
        if positions_BS is None:
            positions_BS = positions_BT
        distance_BTS = positions_BT[:, :, None] - positions_BS[:, None]
        near_BTS = ops.absolute(distance_BTS) < window
        return mask_BTS, angles, ops.logical_and(mask_BTS, near_BTS)
