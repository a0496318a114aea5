"""Configurations of a model: read, validated and written in one place.

They come from presets, hubs, folders of other libraries and callers, so each
field declares its valid values, and all are checked before anything is built.
"""

import json
from dataclasses import dataclass
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import Self

from keras_paligemma.checked import Checked
from keras_paligemma.checked import choice
from keras_paligemma.checked import flag
from keras_paligemma.checked import number
from keras_paligemma.checked import part
from keras_paligemma.checked import shown
from keras_paligemma.checked import text
from keras_paligemma.checked import whole
from keras_paligemma.lora_config import LoraConfig

RESIZES = ("bilinear", "bilinear_antialias", "bicubic")
QUANTIZATIONS = ("int8", "int4")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPES += ("mixed_bfloat16", "mixed_float16")
# The index of the largest published model has 0.1 MB.
JSON_LIMIT = 10_000_000


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        ValueError: the file is missing, too large or not JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(
                f"it has {size:,} bytes, expected at most {limit:,}"
            )
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON: {error}. Copy or save it again."
        ) from error


def parse_json(source: str | bytes) -> Any:
    """Parse JSON of any depth, with one kind of error.

    Raises:
        ValueError: it is not JSON, or its brackets are nested too deeply.
    """
    try:
        return json.loads(source)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


@dataclass(frozen=True)
class VisionEncoderConfig(Checked):
    """Sizes of the vision tower; the defaults are SigLIP So400m/14.

    Args:
        patch_size: int, side of a patch in pixels.
        num_layers: int, encoder blocks.
        hidden_dim: int, width D of an image token; a multiple of
            `num_heads`.
        num_heads: int.
        intermediate_dim: int F.
        layer_norm_epsilon: float.

    Source: https://arxiv.org/abs/2305.13035.
    """

    patch_size: int = whole(1024, 14)
    num_layers: int = whole(512, 27)
    hidden_dim: int = whole(65_536, 1152)
    num_heads: int = whole(1024, 16)
    intermediate_dim: int = whole(1_048_576, 4304)
    layer_norm_epsilon: float = number(1e-12, 1, 1e-6)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                "The width of the vision encoder must be a multiple of its "
                f"heads. Received: hidden_dim={self.hidden_dim}, "
                f"num_heads={self.num_heads}."
            )

    def num_image_tokens(self, image_size: int) -> int:
        """Return the number of tokens of a picture.

        Args:
            image_size: int, side of the square picture in pixels.

        Raises:
            ValueError: the size is not a multiple of the patch size.
        """
        if image_size % self.patch_size:
            raise ValueError(
                "The image size must be a multiple of the patch size. "
                f"Received: image_size={image_size}, "
                f"patch_size={self.patch_size}."
            )
        return (image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextDecoderConfig(Checked):
    """Sizes of the decoder; the defaults are Gemma 2 2B, of PaliGemma 2 3b.

    Args:
        vocabulary_size: int V.
        num_layers: int.
        hidden_dim: int D.
        intermediate_dim: int F, the width of `gate` and of `up`.
        num_query_heads: int N.
        num_key_value_heads: int K, a divisor of N.
        head_dim: int H, even.
        query_pre_attention_scalar: float; queries are multiplied by its
            inverse square root (256 for 3b and 10b, 144 for 28b).
        attention_logit_soft_cap: float or `None`.
        final_logit_soft_cap: float or `None`.
        use_post_norms: bool; `False` for Gemma 1, as in PaliGemma 1.
        sliding_window_size: int or `None`: every other block, the first
            one included, sees only tokens nearer than this many positions.
        rope_base: float, wavelength ratio of the rotary embedding.
        rms_norm_epsilon: float.

    Source: https://arxiv.org/abs/2408.00118.
    """

    vocabulary_size: int = whole(16_777_216, 257_152)
    num_layers: int = whole(512, 26)
    hidden_dim: int = whole(65_536, 2304)
    intermediate_dim: int = whole(1_048_576, 9216)
    num_query_heads: int = whole(1024, 8)
    num_key_value_heads: int = whole(1024, 4)
    head_dim: int = whole(4096, 256)
    query_pre_attention_scalar: float = number(1e-6, 1e9, 256)
    attention_logit_soft_cap: float | None = number(1e-6, 1e9, 50.0, True)
    final_logit_soft_cap: float | None = number(1e-6, 1e9, 30.0, True)
    use_post_norms: bool = flag(True)
    sliding_window_size: int | None = whole(2**31 - 1, None, optional=True)
    rope_base: float = number(1, 1e12, 10_000.0)
    rms_norm_epsilon: float = number(1e-12, 1, 1e-6)

    def __post_init__(self):
        super().__post_init__()
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                "Query heads must be a multiple of key-value heads. Received: "
                f"num_query_heads={self.num_query_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                "Rotary embedding splits a head in halves: head_dim must be "
                f"even. Received: head_dim={self.head_dim}."
            )

    def query_scale(self) -> float:
        """Return the factor that queries are multiplied by."""
        return self.query_pre_attention_scalar**-0.5


@dataclass(frozen=True)
class BackboneConfig(Checked):
    """A backbone: its image size, its two towers, and how they are stored.

    Args:
        image_size: int, side of a picture in pixels, a multiple of the
            patch size.
        dtype: str, name of a dtype policy, or `None` if not specified.
        vision_encoder: `VisionEncoderConfig`.
        text_decoder: `TextDecoderConfig`.
        lora: `LoraConfig` or `None`.
        quantization: `None`, `"int8"` or `"int4"`, see `quantization.storage`.

    Example:

    >>> BackboneConfig(image_size=448).num_image_tokens()
    1024
    """

    image_size: int = whole(16_384, 224)
    dtype: str | None = choice(DTYPES, None, optional=True)
    vision_encoder: VisionEncoderConfig = part(
        VisionEncoderConfig, VisionEncoderConfig()
    )
    text_decoder: TextDecoderConfig = part(
        TextDecoderConfig, TextDecoderConfig()
    )
    lora: LoraConfig | None = part(LoraConfig, None)
    quantization: str | None = choice(QUANTIZATIONS, None, optional=True)

    def __post_init__(self):
        super().__post_init__()
        self.num_image_tokens()

    def num_image_tokens(self) -> int:
        """Return the number of tokens of one picture."""
        return self.vision_encoder.num_image_tokens(self.image_size)

    def with_fields(self, **values: Any) -> Self:
        """Return a copy with new values of fields of the towers.

        Args:
            **values: values by field; only fields that exist in one of the
                towers, not in both.

        Raises:
            ValueError: unknown field or invalid value.
        """
        changed = {}
        for key, value in values.items():
            if key not in TOWER_OF:
                raise ValueError(
                    f"Not a field that can be given. Received: {shown(key)}. "
                    f"Expected one of {sorted(TOWER_OF)}."
                )
            changed.setdefault(TOWER_OF[key], {})[key] = value
        towers = {
            tower: replace(getattr(self, tower), **new)
            for tower, new in changed.items()
        }
        return replace(self, **towers)


def _tower_of():
    """Return a dict of fields that only one tower has to the tower's name."""
    towers = {
        "vision_encoder": {field.name for field in fields(VisionEncoderConfig)},
        "text_decoder": {field.name for field in fields(TextDecoderConfig)},
    }
    both = set.intersection(*towers.values())
    return {
        key: tower for tower, names in towers.items() for key in names - both
    }


TOWER_OF = _tower_of()


@dataclass(frozen=True)
class PreprocessorConfig(Checked):
    """How pictures and text are turned into the inputs of a backbone.

    Args:
        resize: str, a rule of `preprocessing.resize`.
        prompt_length: int, tokens.
        response_length: int, tokens.
        on_long_prompt: str, `"error"` or `"truncate"`.
        on_long_response: str, `"warn"`, `"keep_eos"` or `"error"`.
    """

    resize: str = choice(RESIZES)
    prompt_length: int = whole(1_048_576, 64, least=3)
    response_length: int = whole(1_048_576, 64)
    on_long_prompt: str = choice(("error", "truncate"), "error")
    on_long_response: str = choice(("warn", "keep_eos", "error"), "warn")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A model: the contents of `config.json` in a preset of this package.

    Args:
        name: str or `None`.
        backbone: `BackboneConfig`.
        preprocessor: `PreprocessorConfig`, or `None` for a model that takes
            preprocessed arrays only.
    """

    name: str | None = text(None, True)
    backbone: BackboneConfig = part(BackboneConfig)
    preprocessor: PreprocessorConfig | None = part(PreprocessorConfig, None)
