"""PaliGemmaBackbone: vision encoder and text decoder on one sequence."""

import collections
from collections.abc import Callable
from typing import Any
from typing import Self

import keras
import keras_hub
from keras import ops

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import classproperty
from keras_paligemma.compat import init_model
from keras_paligemma.compat import never_functional
from keras_paligemma.config import DTYPES
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig
from keras_paligemma.layers.attention import token_positions
from keras_paligemma.layers.weight import Weight
from keras_paligemma.models import adapting
from keras_paligemma.models import exports
from keras_paligemma.models import files
from keras_paligemma.models.call_inputs import call_inputs
from keras_paligemma.models.inputs import check_images
from keras_paligemma.models.inputs import full_masks
from keras_paligemma.models.text_decoder import TextDecoder
from keras_paligemma.models.vision_encoder import VisionEncoder
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.tuning.adapters import Adapters
from keras_paligemma.turns import Turns
from keras_paligemma.types import Config
from keras_paligemma.types import PathLike
from keras_paligemma.types import Tensor


def _decoder_size(field):
    return property(lambda self: getattr(self.text_config, field))


@never_functional
@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaBackbone(keras_hub.models.Backbone):
    """PaliGemma 2 without its head: images and tokens to hidden states.

    The sequence is the image tokens followed by the text: a prefix, then a
    response. Padding may be anywhere, since rotary positions count only valid
    tokens. PaliGemma 1 is the same class with another configuration.

    Args:
        image_size: int, side of an image in pixels, a multiple of the patch.
        vision_encoder: `VisionEncoderConfig` or dict of its fields.
        text_decoder: `TextDecoderConfig` or dict of its fields.
        form: form of repetition of the blocks: "auto", "scanned" or
            "unrolled"; see `layers.stack.LayerStack`.
        remat: `None`, "block", "dots" or "pair": what the backward pass
            recomputes, see `layers.remat`.
        quantization: `None`, "int8" or "int4": storage of the kernels of both
            towers (not of the patch embedding) and of the token embedding.
            These are then frozen; adapters train on top. See
            `quantization.storage`.
        lora: `None` or dict of the arguments of `enable_lora`, as stored with
            a model that has adapters.
        dropout: float, dropout rate of the residual branches of the decoder
            blocks in training. Like `remat` it belongs to a run; presets do
            not store it.
        dtype: dtype policy of weights and computation, or its name, one of
            `config.DTYPES`.

    Call arguments:
        inputs: dict of
            images: float tensor (B, h, w, 3) in [-1, 1], or (B, frames, h, w,
                3); or instead image_embeddings (B, I, D) from
                `encode_images`; or neither, for text alone.
            token_ids: int tensor (B, tokens); whole floats are cast.
            padding_mask: bool tensor (B, tokens), True on valid tokens.
            response_mask: bool tensor (B, tokens), True on the response;
                without it all tokens are prefix.
            attention_mask: optional bool tensor (B, L, L), replaces the mask
                computed from the two masks above.
            positions: optional int tensor (B, L), replaces the positions
                computed from them.
            Instead of the three text arrays, the four of `PromptAndResponse`:
            their shapes determine where the response begins, so that attention
            runs as one kernel on a TPU, see `layers.splash`.

    Returns:
        Tensor (B, L, D), L = image tokens + text tokens: last hidden states
        after the final norm. `logits` applies the head.

    Raises:
        ValueError: if a name, rank, size or dtype is wrong, or an id is
            outside the vocabulary.

    Example:
        >>> import numpy as np
        >>> backbone = PaliGemmaBackbone(
        ...     image_size=28,
        ...     vision_encoder=dict(patch_size=14, num_layers=1,
        ...         hidden_dim=8, num_heads=2, intermediate_dim=12),
        ...     text_decoder=dict(vocabulary_size=32, num_layers=1,
        ...         hidden_dim=16, intermediate_dim=24, num_query_heads=2,
        ...         num_key_value_heads=1, head_dim=6),
        ... )
        >>> hidden_states = backbone({
        ...     "images": np.zeros((1, 28, 28, 3), "float32"),
        ...     "token_ids": np.array([[2, 7, 9]]),
        ...     "padding_mask": np.ones((1, 3), bool),
        ...     "response_mask": np.array([[False, False, True]]),
        ... })
        >>> tuple(hidden_states.shape)
        (1, 7, 16)

    Source: https://arxiv.org/abs/2412.03555.
    """

    def __init__(
        self,
        image_size: int = 224,
        vision_encoder: VisionEncoderConfig | dict[str, Any] | None = None,
        text_decoder: TextDecoderConfig | dict[str, Any] | None = None,
        form: str = "auto",
        remat: str | None = None,
        quantization: str | None = None,
        lora: dict[str, Any] | None = None,
        dropout: float = 0.0,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        # The policy is set first: the towers below inherit it.
        init_model(self, dtype or keras.config.dtype_policy(), **kwargs)
        policy = self.dtype_policy
        if policy.name not in DTYPES:
            raise ValueError(
                "Unknown dtype policy of a model. Received: "
                f"{policy.name!r}. Expected: one of {DTYPES}. For kernels of "
                "few bits, load a checkpoint of floats with "
                "`from_preset(…, quantize='int8')` or 'int4'."
            )
        if not 0 <= dropout < 1:
            raise ValueError(
                "`dropout` is a share of at least 0 and below 1. Received: "
                f"{dropout!r}."
            )
        self.image_size = image_size
        self.form = form
        self.remat = remat
        self.quantization = quantization
        self.dropout = dropout
        self.vision_config = _config(VisionEncoderConfig, vision_encoder)
        self.text_config = _config(TextDecoderConfig, text_decoder)
        self.vision_encoder = VisionEncoder(
            self.vision_config,
            image_size,
            self.text_config.hidden_dim,
            form,
            remat,
            quantization,
            dtype=policy,
            name="vision_encoder",
        )
        self.text_decoder = TextDecoder(
            self.text_config,
            form,
            remat,
            quantization,
            dropout,
            dtype=policy,
            name="text_decoder",
        )
        self.token_embedding = self.text_decoder.token_embedding
        with keras.name_scope(self.name, caller=self):
            self.vision_encoder.build()
            self.text_decoder.build()
        self.turns = Turns()
        self.adapters = Adapters(self)
        if lora is not None:
            self.enable_lora(**lora)
        self.built = True

    def build(self, input_shape: Any = None) -> None:
        self.built = True

    def __call__(self, inputs: Any, **kwargs: Any) -> Tensor:
        # Before Keras casts ids and masks to the policy's dtype.
        inputs = call_inputs(inputs, self)
        return super().__call__(inputs, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        text = PromptAndResponse.among(inputs)
        if text is not None:
            inputs = {**inputs, **text.whole()}
        image_BID = self._image_tokens(inputs)
        x_BLD = self.embed({**inputs, "image_embeddings": image_BID})
        # Not the difference of the lengths: that of a text may be unknown.
        num_image_tokens = 0 if image_BID is None else image_BID.shape[1]
        mask, positions_BL = self.mask_and_positions(inputs, num_image_tokens)
        return self.text_decoder(x_BLD, mask, positions_BL)

    def compute_output_shape(self, inputs_shape: Any) -> tuple[int | None, ...]:
        names = ("token_ids", "prompt_ids", "response_ids")
        texts = [inputs_shape[name] for name in names if name in inputs_shape]
        batch, lengths = texts[0][0], [tokens for _, tokens in texts]
        images = inputs_shape.get("image_embeddings")
        if images is None and inputs_shape.get("images") is not None:
            images = self.vision_encoder.compute_output_shape(
                inputs_shape["images"]
            )
        if images is not None:
            lengths.append(images[1])
        tokens = None if None in lengths else sum(lengths)
        return (batch, tokens, self.text_config.hidden_dim)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None
    ) -> keras.KerasTensor:
        # Keras finds no shapes in a dict of NumPy arrays.
        shapes = {
            name: tuple(value.shape)
            for name, value in inputs.items()
            if value is not None
        }
        shape = self.compute_output_shape(shapes)
        return keras.KerasTensor(shape, self.compute_dtype)

    # Sizes under the names of KerasHub's backbones, read-only.
    vocabulary_size = _decoder_size("vocabulary_size")
    num_layers = _decoder_size("num_layers")
    num_query_heads = _decoder_size("num_query_heads")
    num_key_value_heads = _decoder_size("num_key_value_heads")
    hidden_dim = _decoder_size("hidden_dim")
    intermediate_dim = _decoder_size("intermediate_dim")
    head_dim = _decoder_size("head_dim")

    @property
    def image_sequence_length(self) -> int:
        """Number of tokens per image."""
        return self.vision_config.num_image_tokens(self.image_size)

    @property
    def vit_encoder(self) -> keras.layers.Layer:
        """The vision encoder, under KerasHub's name."""
        return self.vision_encoder

    @property
    def transformer_layers(self) -> Any:
        """The decoder's blocks; scanned blocks are not Keras layers."""
        # Not a list: saving in Keras would traverse it and write each block
        # separately.
        return collections.UserList(self.text_decoder.blocks.each_block())

    def embed(self, inputs: Any) -> Tensor:
        """Embed images and tokens as one sequence (B, L, D).

        Text embeddings are scaled by the square root of the width, image
        tokens are not.
        """
        text_BTD = self.token_embedding(inputs["token_ids"])
        image_BID = self._image_tokens(inputs)
        if image_BID is None:
            return text_BTD
        image_BID = ops.cast(image_BID, text_BTD.dtype)
        return ops.concatenate([image_BID, text_BTD], axis=1)

    def _image_tokens(self, inputs):
        """Return the image tokens, given or encoded; `None` for text alone."""
        image_BID = inputs.get("image_embeddings")
        if image_BID is None and inputs.get("images") is not None:
            return self.encode_images(inputs["images"])
        return image_BID

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode images as image tokens, with the vision tower alone.

        Args:
            images: float tensor (B, h, w, 3) in [-1, 1], or (B, frames, h, w,
                3).

        Returns:
            Tensor (B, I, D), I = frames × (image_size / patch_size)².
        """
        check_images(images, self.image_size)
        return self.vision_encoder(images)

    def mask_and_positions(
        self, inputs: Any, num_image_tokens: int
    ) -> tuple[Any, Tensor]:
        """Return the attention mask and the rotary positions (B, L).

        Args:
            inputs: dict of a call's inputs, with whole texts. If it also has
                prompt and response in two parts, their shapes determine where
                the response begins.
            num_image_tokens: int I.
        """
        mask = inputs.get("attention_mask")
        positions_BL = inputs.get("positions")
        if mask is not None:
            mask = ops.cast(mask, "bool")
        if mask is None or positions_BL is None:
            valid_BL, response_BL = full_masks(inputs, num_image_tokens)
            if mask is None:
                text = PromptAndResponse.among(inputs)
                mask = self.text_decoder.mask_of(
                    valid_BL, response_BL, text and text.response_length
                )
            if positions_BL is None:
                positions_BL = token_positions(valid_BL)
        return mask, positions_BL

    def logits(self, hidden_states: Tensor, capped: Any = True) -> Tensor:
        """Apply the tied head and the final soft cap.

        Args:
            hidden_states: tensor (..., D), from a call.
            capped: bool, whether to apply the cap, if the model has one.

        Returns:
            float32 tensor (..., V).
        """
        if isinstance(hidden_states, keras.KerasTensor):
            # A layer of the functional model, which without it would keep the
            # values that the table has now.
            return self.token_embedding(
                hidden_states, reverse=True, capped=capped
            )
        return self.head(capped)(hidden_states)

    def head(self, capped: Any = True) -> Callable[[Tensor], Tensor]:
        """Return the tied head, as `StreamedCrossEntropy.stream` takes it."""
        return self.token_embedding.head(capped)

    def weights_by_name(self) -> dict[str, Any]:
        """Return the weights by name, equal in both forms of repetition.

        Checkpoint files and tables use these names. They do not contain block
        numbers: the weights of all blocks share one name.

        Returns:
            dict of str to `layers.weight.Weight`.
        """
        weights = {}
        towers = (self.vision_encoder, self.text_decoder)
        for tower in towers:
            stack = tower.blocks
            inside = {id(variable) for variable in stack.variables}
            for variable in tower.variables:
                if id(variable) not in inside:
                    name = variable.path.split(f"{tower.name}/", 1)[1]
                    weights[f"{tower.name}/{name}"] = Weight((variable,))
            for name, weight in stack.weights_by_name().items():
                weights[f"{tower.name}/blocks/{name}"] = weight
        return weights

    @property
    def lora(self) -> Any:
        """Configuration of the active adapter as a dict, or `None`."""
        lora = self.adapters.config()
        return lora and lora.to_dict()

    enable_lora = adapting.enable_lora
    load_adapter = adapting.load_adapter
    save_adapter = adapting.save_adapter
    save_lora_weights = adapting.save_lora_weights
    load_lora_weights = adapting.load_lora_weights
    freeze = adapting.freeze
    unfreeze = adapting.unfreeze
    trainable_table = adapting.trainable_table

    @classproperty
    def presets(cls) -> dict[str, Any]:
        """Return the presets: a dict of name to metadata."""
        return presets.describe_all()

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        load_weights: bool = True,
        dtype: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load a backbone from a preset; see `PaliGemmaCausalLM`."""
        fields = files.split_fields(kwargs)
        checkpoint = formats.resolve(preset, load_weights, fields)
        return files.load_backbone(
            cls, checkpoint, load_weights, dtype, **kwargs
        )

    def save_to_preset(
        self, preset_dir: PathLike, max_shard_size: float = 10
    ) -> None:
        """Write configuration and weights to a preset directory.

        Args:
            preset_dir: str or path.
            max_shard_size: float, largest file in GiB; see
                `PaliGemmaCausalLM.save_to_preset`.
        """
        exports.save_backbone(self, preset_dir, max_shard_size)

    def architecture(self) -> Any:
        """Return the `BackboneConfig` that a preset's file holds."""
        return BackboneConfig(
            image_size=self.image_size,
            dtype=self.dtype_policy.name,
            vision_encoder=self.vision_config,
            text_decoder=self.text_config,
            lora=self.adapters.config(),
            quantization=self.quantization,
        )

    def quantize(
        self,
        mode: Any = None,
        config: Any = None,
        filters: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raise an error: weights are quantised while they are loaded."""
        raise ValueError(files.QUANTIZE)

    @classmethod
    def from_config(cls, config: Config) -> Self:
        config = dict(config)
        active, merged = config.pop("active", True), config.pop("merged", False)
        backbone = cls(**config)
        if config.get("lora") is not None:
            backbone.adapters.set_state(active, merged)
        return backbone

    def get_config(self) -> Config:
        return super().get_config() | {
            **self.architecture().to_dict(),
            **self.adapters.get_config(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "form": self.form,
            "remat": self.remat,
            "dropout": self.dropout,
        }


def _config(cls, value):
    return value if isinstance(value, cls) else cls.from_dict(value or {})
