"""The methods of `PaliGemmaBackbone` that choose what is trained."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from keras_paligemma.lora_config import LoraConfig
from keras_paligemma.tuning import adapter_files
from keras_paligemma.tuning import lora_weights
from keras_paligemma.tuning import trainable
from keras_paligemma.turns import alone
from keras_paligemma.types import PathLike


def enable_lora(
    self,
    rank: int,
    target_layer_names: Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    name: str = "default",
    *,
    targets: Sequence[str] | None = None,
    dora: bool = False,
    bias: bool = False,
    ranks: Mapping[str, Sequence[int]] | None = None,
    alphas: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Freeze all weights and add trainable low-rank adapters.

    A second adapter, under another name, uses the space allocated by the
    first; see `adapters` for switching and merging.

    Args:
        rank: int.
        target_layer_names: str or list of str: "decoder",
            "decoder.attention", "decoder.mlp", the same of "vision",
            "projector", "all", or names of projections from
            `lora_config.TARGETS`. `None` is the decoder's attention.
        alpha: float, adapters are scaled by alpha / rank. `None` is `rank`.
        dropout: float, dropout rate of an adapter's inputs in training.
        rslora: bool, scale by alpha / √rank.
        name: str.
        targets: alias of `target_layer_names`, used by adapter
            configurations.
        dora: bool, also train a gain for each output.
        bias: bool, also train a bias for each output.
        ranks: dict of target to list of int, ranks per layer where they
            differ, 0 for none; `rank` is the largest.
        alphas: dict of target to list of float, likewise.

    Raises:
        ValueError: if targets are unknown, none, or given by both names, the
            name exists, or the adapter exceeds the space of the first one or
            has another dropout.
    """
    if targets is not None and target_layer_names is not None:
        raise ValueError(
            "`targets` and `target_layer_names` are the same. Received: "
            f"{targets} and {target_layer_names}. Expected: one of them."
        )
    if targets is None:
        targets = target_layer_names
    if isinstance(targets, str):
        targets = (targets,)
    if targets is not None and not targets:
        raise ValueError(
            "An adapter needs targets. Received: an empty list. Expected: "
            "names, or None for the decoder's attention."
        )
    lora = LoraConfig(
        rank,
        alpha,
        () if targets is None else targets,
        dropout,
        rslora,
        dora,
        bias,
        {} if ranks is None else ranks,
        {} if alphas is None else alphas,
    )
    self.adapters.add(name, lora)


def load_adapter(
    self,
    folder: PathLike,
    name: str = "default",
    allow_nonfinite: bool = False,
) -> None:
    """Add a low-rank adapter written by PEFT or `save_adapter`.

    Ranks per layer, DoRA, biases and `modules_to_save` are supported. Full
    weights that it replaces, by `bias` or `modules_to_save`, stay frozen
    until `unfreeze` names them. For DoRA, gains are trained instead of
    magnitudes; `save_adapter` writes magnitudes.

    Args:
        folder: str or path.
        name: str, as `adapters.select` takes it.
        allow_nonfinite: bool, whether to accept NaN and infinite weights.

    Raises:
        ValueError: if there is no adapter, its kind is not supported, it
            does not fit, holds NaN, or the name exists. The model is then
            unchanged.
    """
    adapter_files.load(self, folder, name, allow_nonfinite)


def save_adapter(
    self, folder: PathLike, name: str | None = None, base: str | None = None
) -> None:
    """Write an adapter in PEFT's format, for the model of transformers.

    Other weights are not written. If some are trainable, such as norms that
    were unfrozen, a warning names them: `save_to_preset` writes them.

    Args:
        folder: str or path.
        name: str, the adapter; `None` is the active one, or the one that was
            active last.
        base: str or `None`, name of the base model.
    """
    with self.turns:
        adapter_files.save(self, folder, name, base)


def save_lora_weights(self, filepath: PathLike) -> None:
    """Write an adapter to one file, for `load_lora_weights`.

    It is the active adapter, or if all are off, the one that was active last.
    `save_adapter` writes the format of PEFT and transformers.

    Args:
        filepath: str or path, "….lora.h5".

    Raises:
        ValueError: if there is no adapter, or the suffix is another.
    """
    with self.turns:
        lora_weights.save(self, filepath)


def load_lora_weights(self, filepath: PathLike) -> None:
    """Load a file of `save_lora_weights`.

    Its values replace those of the adapter that is loaded. A model without
    adapters gets one, named "default".

    Args:
        filepath: str or path.

    Raises:
        ValueError: if the file holds no such adapter, or one of another rank
            or other targets than the loaded one.
    """
    lora_weights.load(self, filepath)


@alone
def freeze(self, *patterns: str | Sequence[str]) -> None:
    """Freeze the weights whose names match a pattern.

    Args:
        *patterns: str, such as `"vision_encoder/*"` or `"*/mlp/*"`; `"*"`
            also matches "/". Names are those of `weights_by_name`.
    """
    trainable.set_trainable(self, patterns, False)


@alone
def unfreeze(self, *patterns: str | Sequence[str]) -> None:
    """Make the weights whose names match trainable; see `freeze`."""
    trainable.set_trainable(self, patterns, True)


def trainable_table(self) -> Any:
    """Return a table of the trainable weights and parameters, as str."""
    return trainable.table(self)
