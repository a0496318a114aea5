"""The job to plan: preset, batch, lengths, adapters, quantisation."""

import dataclasses
import functools
from numbers import Integral
from typing import Any

from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import compiling_for
from keras_paligemma.compat import without_values
from keras_paligemma.config import DTYPES
from keras_paligemma.config import BackboneConfig
from keras_paligemma.layers.cache import check_cache_dtype
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.lora_config import LoraConfig
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.files import quantization_of
from keras_paligemma.sharding.layouts import Layout
from keras_paligemma.tuning.optimizers import Adam


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that memory and time of training or generation depend on.

    Args:
        preset: str, as `from_preset` takes it.
        batch_size: int, global batch size, over all chips.
        prompt_length: int, tokens.
        response_length: int, tokens.
        pictures: int, pictures or frames per prompt.
        lora_rank: int; 0 trains all weights. `None` is the adapter that the
            preset has, or to train, a new one of rank 8.
        lora_targets: tuple of str, see `enable_lora`; the decoder's attention
            if `None`.
        quantize: "int8", "int4" or `None`.
        dtype: str, dtype policy.
        cache_dtype: "int8" or `None`, of keys and values in generation.

    Raises:
        ValueError: a number that is no integer or below 1, an unknown `dtype`
            or `cache_dtype`, or targets of no adapter.
    """

    preset: str
    batch_size: int = 8
    prompt_length: int = 64
    response_length: int = 64
    pictures: int = 1
    lora_rank: int | None = None
    lora_targets: tuple[Any, ...] | None = None
    quantize: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def __post_init__(self):
        counts = ("batch_size", "prompt_length", "response_length", "pictures")
        for name in (*counts, "lora_rank"):
            value = getattr(self, name)
            least = int(name in counts)
            if value is None and not least:
                continue
            if not isinstance(value, Integral) or value < least:
                raise ValueError(
                    f"{name} is at least {least}, and an integer. Received: "
                    f"{value!r}."
                )
            object.__setattr__(self, name, int(value))
        if isinstance(self.lora_targets, str):
            object.__setattr__(self, "lora_targets", (self.lora_targets,))
        if self.lora_rank == 0 and self.lora_targets:
            raise ValueError(
                "All weights are trained without adapters. Received: "
                f"lora_rank=0 and lora_targets={self.lora_targets}. Expected: "
                "one of them."
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"Unknown dtype policy of a model. Received: dtype="
                f"{self.dtype!r}. Expected: one of {DTYPES}."
            )
        check_cache_dtype(self.cache_dtype)

    @property
    def text_length(self) -> int:
        return self.prompt_length + self.response_length

    @functools.cached_property
    def config(self) -> BackboneConfig:
        """The preset's configuration."""
        return formats.resolve(self.preset, False).config.backbone

    @property
    def quantization(self) -> str | None:
        """How the loaded weights are stored, `None` for floats."""
        return quantization_of(self.config, self.quantize)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter, the preset's own or a new one; `None` without one."""
        stored = self.config.lora
        if stored is None and self.lora_rank == 0:
            return None
        default = 8 if stored is None else stored.rank
        asked = LoraConfig(
            self.lora_rank or default, targets=self.lora_targets or ()
        )
        if stored is None:
            return asked
        same = self.lora_targets is None or asked.targets == stored.targets
        if asked.rank != stored.rank or not same:
            raise ValueError(
                f"{self.preset!r} has an adapter of rank {stored.rank} for "
                f"{stored.targets}. Received: lora_rank={self.lora_rank}, "
                f"lora_targets={self.lora_targets}. Expected: none, to go on "
                "with this adapter, or a preset without one."
            )
        return stored

    @property
    def adapter_apart(self) -> LoraConfig | None:
        """The adapter, if the preset does not have it."""
        return self.lora if self.config.lora is None else None

    def image_tokens(self, backbone: PaliGemmaBackbone) -> int:
        """Return the number of image tokens of one prompt."""
        return self.pictures * backbone.image_sequence_length

    def images_shape(self, image_size: int) -> tuple[int, ...]:
        """Return the shape of a batch of pictures, as the backbone takes it."""
        frames = () if self.pictures == 1 else (self.pictures,)
        return (self.batch_size, *frames, image_size, image_size, 3)

    def model(
        self, remat: str | None = "block", form: str = "scanned"
    ) -> tuple[PaliGemmaBackbone, Adam]:
        """Build backbone and optimizer, without values.

        Args:
            remat: one of `layers.remat.REMATS`.
            form: str, form of the stacks of blocks, "scanned" or "unrolled".

        Returns:
            Tuple of `PaliGemmaBackbone` and built `Adam`.
        """
        lora = self.lora
        fields = self.config.to_dict() | {
            "dtype": self.dtype,
            "remat": remat,
            "form": form,
            "quantization": self.quantization,
            "lora": lora and lora.to_dict(),
        }
        optimizer = Adam()
        with without_values(), compiling_for("tpu"):
            backbone = PaliGemmaBackbone(**fields)
            optimizer.build(backbone.trainable_variables)
        return backbone, optimizer

    def code(
        self, layout: Layout, remat: str | None, last_lines: list[str]
    ) -> str:
        """Return Python code that loads the model as planned and runs it.

        Args:
            layout: `Layout`.
            remat: one of `layers.remat.REMATS`.
            last_lines: list of str, lines that use `model`.

        Returns:
            str.
        """
        lines = ["import keras", "import keras_paligemma as kp"]
        if layout.chips > 1:
            lines += [
                "from keras_paligemma.sharding import distribute",
                "",
                "keras.distribution.set_distribution(",
                f'    distribute("{layout.strategy}", '
                f"({layout.groups}, {layout.group}))",
                ")",
            ]
        lines += [
            "model = kp.PaliGemmaCausalLM.from_preset(",
            f'    "{self.preset}",',
            f'    dtype="{self.dtype}",',
            '    form="scanned",',
            f"    remat={remat!r},".replace("'", '"'),
        ]
        if self.quantize:
            lines.append(f'    quantize="{self.quantize}",')
        lines += [
            f"    prompt_length={self.prompt_length},",
            f"    response_length={self.response_length},",
            ")",
        ]
        return "\n".join(lines + last_lines)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a job.

    Args:
        layout: `Layout`.
        remat: what the backward pass recomputes, one of
            `layers.remat.REMATS`; `None` if there is no backward pass.
    """

    layout: Layout
    remat: str | None = None


def layouts_of(chips):
    """Return all layouts of a number of chips."""
    layouts = [Layout("data", chips, 1)]
    groups = [size for size in range(2, chips + 1) if chips % size == 0]
    for group in groups:
        layouts.append(Layout("weights", chips // group, group))
        layouts.append(Layout("tensor", chips // group, group))
        if group < chips:
            layouts.append(Layout("both", chips // group, group))
    return layouts


def kernel_values(backbone, part):
    """Count the values of kernels; each is one, in however few bits.

    Args:
        backbone: `PaliGemmaBackbone`.
        part: str, beginning of the kernels' names.

    Returns:
        int.
    """
    weights = dequantized(backbone.weights_by_name())
    return sum(
        weight.size
        for name, weight in weights.items()
        if name.startswith(part) and name.endswith("kernel")
    )
