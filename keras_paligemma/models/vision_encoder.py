"""SigLIP's vision transformer and the projector to the decoder's width."""

import keras
from keras import ops

from keras_paligemma.layers.blocks import EncoderBlock
from keras_paligemma.layers.blocks import LayerNorm
from keras_paligemma.layers.dropout import dropout_scope
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.stack import LayerStack


class VisionEncoder(keras.layers.Layer):
    """Encode images as image tokens of the decoder's width.

    Args:
        config: `VisionEncoderConfig`.
        image_size: int, side of an image in pixels; a multiple of the patch.
        output_dim: int, width of the decoder.
        form: form of repetition, see `LayerStack`.
        remat: see `LayerStack`.
        quantization: storage of all kernels except the patch embedding's, see
            `Projection`.

    Call arguments:
        images_BhwC: float tensor (batch, image_size, image_size, 3) in
            [-1, 1], or (batch, frames, image_size, image_size, 3).

    Returns:
        Tensor (batch, image tokens, output_dim); the tokens of several frames
        are concatenated without a separator.
    """

    def __init__(
        self,
        config,
        image_size,
        output_dim,
        form="auto",
        remat=None,
        quantization=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        config.num_image_tokens(image_size)  # Raises on invalid sizes.
        self.config = config
        self.image_size = image_size
        policy = self.dtype_policy
        patch = config.patch_size
        self.patch_embedding = Projection(
            (patch, patch, 3),
            (config.hidden_dim,),
            use_bias=True,
            dtype=policy,
            name="patch_embedding",
        )
        self.blocks = LayerStack(
            lambda: EncoderBlock(
                config.hidden_dim,
                config.intermediate_dim,
                config.num_heads,
                config.layer_norm_epsilon,
                quantization,
                dtype=policy,
                name="block",
            ),
            config.num_layers,
            form,
            remat,
            dtype=policy,
            name="blocks",
        )
        self.final_norm = LayerNorm(
            epsilon=config.layer_norm_epsilon, dtype=policy, name="final_norm"
        )
        # Zeros, as in the original: image tokens of an untrained tower are
        # zero.
        self.projector = Projection(
            (config.hidden_dim,),
            (output_dim,),
            use_bias=True,
            kernel_initializer="zeros",
            quantization=quantization,
            dtype=policy,
            name="projector",
        )

    def build(self, input_shape=None):
        width = self.config.hidden_dim
        self.patch_embedding.build()
        self.position_embedding = self.add_weight(
            shape=(self.config.num_image_tokens(self.image_size), width),
            initializer=keras.initializers.RandomNormal(stddev=width**-0.5),
            name="position_embedding",
        )
        self.blocks.build()
        self.final_norm.build((None, None, width))
        self.projector.build()
        self.built = True

    def call(self, images_BhwC, training=None):
        x_BID = self.blocks(self.embed(images_BhwC))
        # The projector's dropout takes the seed of one more block.
        seed = self.blocks.draw_seed(training)
        with dropout_scope(seed, self.config.num_layers):
            return self.project(x_BID, images_BhwC)

    def embed(self, images_BhwC):
        """Return the first block's input: patch and position embeddings."""
        size, patch = self.image_size, self.config.patch_size
        rows = size // patch
        images = ops.cast(images_BhwC, self.compute_dtype)
        patches = ops.reshape(images, (-1, rows, patch, rows, patch, 3))
        patches = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
        patches = ops.reshape(patches, (-1, rows * rows, patch, patch, 3))
        return self.patch_embedding(patches) + self.position_embedding

    def project(self, x_BID, images_BhwC):
        """Project the last block's output to image tokens."""
        x_BID = self.projector(self.final_norm(x_BID))
        # The number of tokens is static even if the batch size is not.
        tokens_and_width = self.compute_output_shape(images_BhwC.shape)[1:]
        return ops.reshape(x_BID, (-1, *tokens_and_width))

    def compute_output_shape(self, images_shape):
        frames = images_shape[1] if len(images_shape) == 5 else 1
        tokens = self.config.num_image_tokens(self.image_size)
        tokens = None if frames is None else frames * tokens
        width = self.projector.output_axes[0]
        return (images_shape[0], tokens, width)
