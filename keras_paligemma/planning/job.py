"""The job to plan: preset, batch, lengths, adapters, quantisation."""

import dataclasses
from typing import Any

from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import compiling_for
from keras_paligemma.compat import without_values
from keras_paligemma.layers.cache import check_cache_dtype
from keras_paligemma.models.backbone import PaliGemmaBackbone
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
        lora_rank: int; 0 trains all weights.
        lora_targets: tuple of str, see `enable_lora`; the decoder's attention
            if `None`.
        quantize: "int8", "int4" or `None`.
        dtype: str, dtype policy.
        cache_dtype: "int8" or `None`, of keys and values in generation.

    Raises:
        ValueError: a number below 1, `quantize` without adapters, or an
            unknown `cache_dtype`.
    """

    preset: str
    batch_size: int = 8
    prompt_length: int = 64
    response_length: int = 64
    pictures: int = 1
    lora_rank: int = 8
    lora_targets: tuple[Any, ...] | None = None
    quantize: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None

    def __post_init__(self):
        counts = ("batch_size", "prompt_length", "response_length", "pictures")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is at least 1. Received: {getattr(self, name)}."
                )
        check_cache_dtype(self.cache_dtype)
        if self.quantize and not self.lora_rank:
            raise ValueError(
                "Weights in low bits cannot be trained. Received: quantize="
                f"{self.quantize!r} for a full fine-tune. Expected: adapters "
                "(lora_rank=8), or no quantize."
            )

    @property
    def text_length(self) -> int:
        return self.prompt_length + self.response_length

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
        config = formats.resolve(self.preset, False).config.backbone.to_dict()
        fields = {**config, "dtype": self.dtype, "remat": remat, "form": form}
        if self.quantize:
            fields["quantization"] = self.quantize
        optimizer = Adam()
        with without_values(), compiling_for("tpu"):
            backbone = PaliGemmaBackbone(**fields)
            if self.lora_rank:
                backbone.enable_lora(self.lora_rank, targets=self.lora_targets)
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
        if self.lora_rank:
            targets = ""
            if self.lora_targets:
                named = ", ".join(f'"{name}"' for name in self.lora_targets)
                targets = f", targets=[{named}]"
            lines.append(f"model.enable_lora(rank={self.lora_rank}{targets})")
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
