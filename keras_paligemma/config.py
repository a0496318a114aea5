"""What a model is, in plain values: read, checked and written in one place.

Configurations come from anywhere: presets, hubs, folders of other libraries,
callers. Each field says what its value may be, and all of them are looked at
before anything is built.
"""

import dataclasses
import json
import numbers
import reprlib
from dataclasses import MISSING
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import Self

RESIZES = ("bilinear", "bilinear_antialias", "bicubic")
QUANTIZATIONS = ("int8", "int4")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPES += ("mixed_bfloat16", "mixed_float16")
# The index of the largest published model has 0.1 MB.
JSON_LIMIT = 10_000_000

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: object) -> str:
    """Shows what was received, cut where it is long: it may be anything."""
    return _short.repr(value)


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Reads a JSON file of at most `limit` bytes.

    Raises:
        ValueError: the file is missing, too large or no JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(
                f"it has {size:,} bytes, expected at most {limit:,}"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        error = "its brackets are nested too deeply"
    except (OSError, ValueError) as caught:
        error = caught
    raise ValueError(
        f"{path} cannot be read as JSON: {error}. Copy or save it again."
    )


# What a field may be: a description for errors, and a function that tells.


def _field(expected, fits, default, optional=False) -> Any:
    if optional:
        expected += " or None"

    def allowed(value):
        return (optional and value is None) or fits(value)

    metadata = {"expected": expected, "allowed": allowed}
    return field(default=default, metadata=metadata)


def _whole(most, default=MISSING, least=1, optional=False):
    def fits(value):
        whole = isinstance(value, numbers.Integral)
        whole = whole and type(value) is not bool
        # `numbers` declares no order to type checkers.
        return whole and least <= value <= most  # pyright: ignore[reportOperatorIssue]

    expected = f"an integer of {least} to {most}"
    return _field(expected, fits, default, optional)


def _number(least, most, default=MISSING, optional=False):
    def fits(value):
        real = isinstance(value, numbers.Real)
        real = real and type(value) is not bool
        # No comparison holds for NaN.
        return real and least <= value <= most  # pyright: ignore[reportOperatorIssue]

    expected = f"a number of {least} to {most}"
    return _field(expected, fits, default, optional)


def _scale(default=MISSING, optional=False):
    def fits(value):
        real = isinstance(value, numbers.Real) and type(value) is not bool
        return real and 1e-30 <= abs(value) <= 1e30  # pyright: ignore[reportOperatorIssue]

    expected = "a number other than 0 whose size a float32 holds"
    return _field(expected, fits, default, optional)


def _flag(default=MISSING):
    return _field("True or False", lambda value: type(value) is bool, default)


def _choice(values, default=MISSING, optional=False):
    def fits(value):
        return isinstance(value, str) and value in values

    expected = " or ".join(map(repr, values))
    return _field(expected, fits, default, optional)


def _text(default=MISSING, optional=False):
    def fits(value):
        return isinstance(value, str)

    return _field("a string", fits, default, optional)


def _texts(default=MISSING, optional=False):
    def fits(value):
        listed = isinstance(value, (list, tuple))
        return listed and all(isinstance(one, str) for one in value)

    return _field("a list of strings", fits, default, optional)


def _by_target(default=None):
    """A dictionary of a target's name to one number for each layer."""

    def fits(value):
        return isinstance(value, dict) and all(
            isinstance(key, str)
            and isinstance(row, (list, tuple))
            and all(
                isinstance(one, numbers.Real) and type(one) is not bool
                for one in row
            )
            for key, row in value.items()
        )

    expected = "an object of lists of numbers"
    return _field(expected, fits, default, optional=True)


def _part(cls, default=MISSING) -> Any:
    return field(default=default, metadata={"part": cls})


@dataclass(frozen=True)
class Checked:
    """A dataclass whose fields say what they may be, with `_whole` and others.

    They are looked at whenever an instance is made, so whoever is given one
    need not look again.
    """

    def __post_init__(self):
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        _refuse(self.problems(values), type(self).__name__)

    @classmethod
    def problems(
        cls,
        values: object,
        names: dict[str, Any] | None = None,
        prefix: str = "",
    ) -> list[str]:
        """Lists what is missing, unknown, or of a wrong type or range.

        Args:
            values: Dictionary by field; anything else counts as an empty one.
            names: What the source calls its fields, where that differs.
            prefix: Put before the names of the others, such as `"backbone."`.

        Returns:
            Sorted list of phrases, empty if `from_dict` takes the values.
        """
        values = values if isinstance(values, dict) else {}
        known = {one.name: one for one in fields(cls)}
        listed = [
            f"{prefix}{key!s:.80} is unknown" for key in values.keys() - known
        ]
        for key, one in known.items():
            name = (names or {}).get(key, prefix + key)
            value, part = values.get(key, one.default), one.metadata.get("part")
            if value is MISSING:
                listed.append(f"{name} is missing")
            elif part is None:
                if not one.metadata["allowed"](value):
                    listed.append(
                        f"{name} must be {one.metadata['expected']}, received "
                        f"{shown(value)}"
                    )
            elif isinstance(value, dict):
                listed += part.problems(value, prefix=f"{name}.")
            elif not isinstance(value, part) and value is not one.default:
                listed.append(
                    f"{name} must be an object of fields, received "
                    f"{shown(value)}"
                )
        return sorted(listed)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: object = None) -> Self:
        """Makes a configuration of what a file or a caller says.

        Args:
            values: Dictionary by field, of dictionaries for parts. Fields with
                a default may be missing.
            source: Named in errors, such as a path.

        Raises:
            ValueError: listing all that is missing, unknown, of a wrong type
                or out of range; or fields that do not go together.
        """
        source = source or cls.__name__
        _refuse(cls.problems(values), source)
        values = dict(values)
        try:
            for one in fields(cls):
                part = one.metadata.get("part")
                if part and isinstance(values.get(one.name), dict):
                    values[one.name] = part.from_dict(values[one.name])
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values and dictionaries, as a JSON file has them."""
        return dataclasses.asdict(self)


def _refuse(problems, source):
    if problems:
        raise ValueError(
            f"{source} is no configuration that can be built: "
            f"{'; '.join(problems)}."
        )


@dataclass(frozen=True)
class VisionEncoderConfig(Checked):
    """Sizes of the vision tower; the defaults are SigLIP So400m/14.

    Args:
        patch_size: Integer, side of a patch in pixels.
        num_layers: Integer, encoder blocks.
        hidden_dim: Integer, width D of an image token; a multiple of
            `num_heads`.
        num_heads: Integer.
        intermediate_dim: Integer F.
        layer_norm_epsilon: Float.

    Source: https://arxiv.org/abs/2305.13035.
    """

    patch_size: int = _whole(1024, 14)
    num_layers: int = _whole(512, 27)
    hidden_dim: int = _whole(65_536, 1152)
    num_heads: int = _whole(1024, 16)
    intermediate_dim: int = _whole(1_048_576, 4304)
    layer_norm_epsilon: float = _number(1e-12, 1, 1e-6)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                "The width of the vision encoder must be a multiple of its "
                f"heads. Received: hidden_dim={self.hidden_dim}, "
                f"num_heads={self.num_heads}."
            )

    def num_image_tokens(self, image_size: int) -> int:
        """Counts the tokens of one square picture of `image_size` pixels.

        Raises:
            ValueError: the size is no multiple of the patch's.
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
        vocabulary_size: Integer V.
        num_layers: Integer.
        hidden_dim: Integer D.
        intermediate_dim: Integer F, the real width of gate and of up.
        num_query_heads: Integer N.
        num_key_value_heads: Integer K, a divisor of N.
        head_dim: Integer H, even.
        query_pre_attention_scalar: Float; queries are multiplied by its
            inverse square root (256 for 3b and 10b, 144 for 28b).
        attention_logit_soft_cap: Float or `None`.
        final_logit_soft_cap: Float or `None`.
        use_post_norms: Boolean; `False` gives Gemma, of PaliGemma 1.
        sliding_window_size: Integer or `None`: every other block, the first
            one included, sees only tokens nearer than this many positions.
        rope_base: Float, wavelength ratio of the rotary embedding.
        rms_norm_epsilon: Float.

    Source: https://arxiv.org/abs/2408.00118.
    """

    vocabulary_size: int = _whole(16_777_216, 257_152)
    num_layers: int = _whole(512, 26)
    hidden_dim: int = _whole(65_536, 2304)
    intermediate_dim: int = _whole(1_048_576, 9216)
    num_query_heads: int = _whole(1024, 8)
    num_key_value_heads: int = _whole(1024, 4)
    head_dim: int = _whole(4096, 256)
    query_pre_attention_scalar: float = _number(1e-6, 1e9, 256)
    attention_logit_soft_cap: float | None = _number(1e-6, 1e9, 50.0, True)
    final_logit_soft_cap: float | None = _number(1e-6, 1e9, 30.0, True)
    use_post_norms: bool = _flag(True)
    sliding_window_size: int | None = _whole(2**31 - 1, None, optional=True)
    rope_base: float = _number(1, 1e12, 10_000.0)
    rms_norm_epsilon: float = _number(1e-12, 1, 1e-6)

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
        """Gives the number that queries are multiplied with."""
        return self.query_pre_attention_scalar**-0.5


@dataclass(frozen=True)
class LoraConfig(Checked):
    """The adapter that a model was saved with; the backbone's `enable_lora`.

    Args:
        rank: Integer.
        alpha: Float, the adapter is scaled by alpha / rank; the rank if `None`.
        targets: Names of projections, or `None`.
        dropout: Float, share of an adapter's inputs dropped in training.
        rslora: Boolean, scale by alpha / √rank.
        dora: Boolean, a learned gain for each output.
        bias: Boolean, a learned bias for each output.
        ranks: Dictionary of target to the rank of each layer, or `None`.
        alphas: Dictionary of target to the alpha of each layer, or `None`.
    """

    rank: int = _whole(65_536)
    alpha: float | None = _scale(None, optional=True)
    targets: tuple[str, ...] | None = _texts(None, True)
    dropout: float = _number(0, 0.999_999, 0.0)
    rslora: bool = _flag(False)
    dora: bool = _flag(False)
    bias: bool = _flag(False)
    ranks: dict[str, Any] | None = _by_target()
    alphas: dict[str, Any] | None = _by_target()

    def __post_init__(self):
        super().__post_init__()
        if self.targets is not None:  # JSON has lists alone.
            object.__setattr__(self, "targets", tuple(self.targets))


@dataclass(frozen=True)
class BackboneConfig(Checked):
    """A backbone: its picture size, its two towers, and how they are stored.

    Args:
        image_size: Integer, side of a picture in pixels, a multiple of the
            patch.
        dtype: Name of a dtype policy, or `None` where nothing says.
        vision_encoder: `VisionEncoderConfig`.
        text_decoder: `TextDecoderConfig`.
        lora: `LoraConfig` or `None`.
        quantization: `None`, `"int8"` or `"int4"`, see `quantization.storage`.

    Example:

    >>> BackboneConfig(image_size=448).num_image_tokens()
    1024
    """

    image_size: int = _whole(16_384, 224)
    dtype: str | None = _choice(DTYPES, None, optional=True)
    vision_encoder: VisionEncoderConfig = _part(
        VisionEncoderConfig, VisionEncoderConfig()
    )
    text_decoder: TextDecoderConfig = _part(
        TextDecoderConfig, TextDecoderConfig()
    )
    lora: LoraConfig | None = _part(LoraConfig, None)
    quantization: str | None = _choice(QUANTIZATIONS, None, optional=True)

    def __post_init__(self):
        super().__post_init__()
        self.num_image_tokens()

    def num_image_tokens(self) -> int:
        """Counts the tokens of one picture."""
        return self.vision_encoder.num_image_tokens(self.image_size)

    def with_fields(self, **values) -> Self:
        """Gives the same configuration with other values in its towers.

        Args:
            **values: By field, of those that one tower alone has.

        Raises:
            ValueError: another name, or a value that the field cannot have.
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
    """Maps the fields that one tower alone has to its name."""
    towers = {
        "vision_encoder": {one.name for one in fields(VisionEncoderConfig)},
        "text_decoder": {one.name for one in fields(TextDecoderConfig)},
    }
    both = set.intersection(*towers.values())
    return {
        key: tower for tower, names in towers.items() for key in names - both
    }


TOWER_OF = _tower_of()


@dataclass(frozen=True)
class PreprocessorConfig(Checked):
    """How pictures and text become the arrays that a backbone takes.

    Args:
        resize: A rule of `preprocessing.resize`.
        prompt_length: Integer, tokens.
        response_length: Integer, tokens.
        on_long_prompt: `"error"` or `"truncate"`.
        on_long_response: `"warn"`, `"keep_eos"` or `"error"`.
    """

    resize: str = _choice(RESIZES)
    prompt_length: int = _whole(1_048_576, 64, least=3)
    response_length: int = _whole(1_048_576, 64)
    on_long_prompt: str = _choice(("error", "truncate"), "error")
    on_long_response: str = _choice(("warn", "keep_eos", "error"), "warn")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A model: all that `config.json` of a preset of ours says.

    Args:
        name: String or `None`.
        backbone: `BackboneConfig`.
        preprocessor: `PreprocessorConfig`, or `None` for arrays alone.
    """

    name: str | None = _text(None, True)
    backbone: BackboneConfig = _part(BackboneConfig)
    preprocessor: PreprocessorConfig | None = _part(PreprocessorConfig, None)
