"""What a low-rank adapter is, without its values."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from keras_paligemma.checked import Checked
from keras_paligemma.checked import by_target
from keras_paligemma.checked import flag
from keras_paligemma.checked import number
from keras_paligemma.checked import scale
from keras_paligemma.checked import texts
from keras_paligemma.checked import whole

# What can have an adapter: its name, and the place of its weights.
TARGETS = {
    "query": "text_decoder/blocks/attention/query",
    "key": "text_decoder/blocks/attention/key",
    "value": "text_decoder/blocks/attention/value",
    "output": "text_decoder/blocks/attention/output",
    "gate": "text_decoder/blocks/mlp/gate",
    "up": "text_decoder/blocks/mlp/up",
    "down": "text_decoder/blocks/mlp/down",
    "vision.query": "vision_encoder/blocks/attention/query",
    "vision.key": "vision_encoder/blocks/attention/key",
    "vision.value": "vision_encoder/blocks/attention/value",
    "vision.output": "vision_encoder/blocks/attention/output",
    "vision.up": "vision_encoder/blocks/mlp/up",
    "vision.down": "vision_encoder/blocks/mlp/down",
    "projector": "vision_encoder/projector",
}
_ATTENTION = ("query", "key", "value", "output")
_MLP = ("gate", "up", "down")
# A part of the model stands for its projections.
GROUPS = {
    "decoder": (*_ATTENTION, *_MLP),
    "decoder.attention": _ATTENTION,
    "decoder.mlp": _MLP,
    "vision": tuple(name for name in TARGETS if name.startswith("vision.")),
    "vision.attention": tuple(f"vision.{name}" for name in _ATTENTION),
    "vision.mlp": ("vision.up", "vision.down"),
    "all": tuple(TARGETS),
    # PEFT's name of them.
    "all-linear": tuple(TARGETS),
}


@dataclass(frozen=True)
class LoraConfig(Checked):
    """A low-rank adapter: the arguments of `enable_lora`, all filled in.

    Args:
        rank: int, the largest of its layers.
        alpha: float, the adapter is scaled by alpha / rank; the rank if `None`.
        targets: Names of projections, of `TARGETS`, or of `GROUPS`; those of
            the decoder's attention if `None`.
        dropout: float, share of an adapter's inputs dropped in training.
        rslora: bool, scale by alpha / √rank, so that large ranks learn as
            fast as small ones.
        dora: bool, a learned gain for each output of a projection.
        bias: bool, a learned bias for each output of a projection.
        ranks: dict of target to the rank of each layer, 0 where it has
            none; `rank` for targets that are not there.
        alphas: dict of target to the alpha of each layer, likewise.

    Example:

    >>> lora = LoraConfig(4, targets=["decoder.mlp"])
    >>> lora.targets, lora.alpha
    (('gate', 'up', 'down'), 4)

    Source: https://arxiv.org/abs/2106.09685; of the other scale,
        https://arxiv.org/abs/2312.03732; of the gain,
        https://arxiv.org/abs/2402.09353.
    """

    rank: int = whole(65_536)
    alpha: float | None = scale(None, optional=True)
    targets: Sequence[str] = texts(None, True)
    dropout: float = number(0, 0.999_999, 0.0)
    rslora: bool = flag(False)
    dora: bool = flag(False)
    bias: bool = flag(False)
    ranks: Mapping[str, Sequence[int]] = by_target()
    alphas: Mapping[str, Sequence[float]] = by_target()

    def __post_init__(self):
        super().__post_init__()
        if self.dora and self.bias:
            raise ValueError(
                "An adapter has gains or biases. Received: dora=True and "
                "bias=True. Leave one out: PEFT knows no adapter of both."
            )
        targets = self.targets or ("decoder.attention",)
        unknown = sorted(set(targets) - {*GROUPS, *TARGETS})
        if unknown:
            raise ValueError(
                f"Unknown targets of LoRA. Received: {unknown}. Expected some "
                f"of {(*GROUPS, *TARGETS)}."
            )
        named = {name for key in targets for name in GROUPS.get(key, (key,))}
        ordered = tuple(name for name in TARGETS if name in named)
        object.__setattr__(self, "targets", ordered)
        alpha = self.rank if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", alpha)
        for name in ("ranks", "alphas"):
            lists = (getattr(self, name) or {}).items()
            tuples = {target: tuple(values) for target, values in lists}
            object.__setattr__(self, name, tuples)
        self._check_layers()

    def _check_layers(self):
        strange = sorted({*self.ranks, *self.alphas} - {*self.targets})
        if strange:
            raise ValueError(
                "Ranks and alphas of layers are those of targets. Received: "
                f"{strange}. Expected some of {self.targets}."
            )
        for target, ranks in self.ranks.items():
            if not all(
                isinstance(rank, Integral) and 0 <= int(rank) <= self.rank
                for rank in ranks
            ):
                raise ValueError(
                    f"The rank of a layer is an integer of 0 to {self.rank}. "
                    f"Received: {target!r} of {ranks}."
                )
        for target, alphas in self.alphas.items():
            # A scale of 0 is how an adapter is turned off.
            if not all(1e-30 <= abs(alpha) <= 1e30 for alpha in alphas):
                raise ValueError(
                    "The alpha of a layer is a number other than 0 whose size "
                    f"a float32 holds. Received: {target!r} of {alphas}."
                )

    @property
    def pieces(self) -> tuple[str, ...]:
        """The names of what each projection has beside its kernel."""
        return (
            "adapter_a",
            "adapter_b",
            *(["adapter_bias"] if self.bias else []),
            *(["adapter_gain"] if self.dora else []),
        )

    def ranks_of(self, target: str, num_layers: int) -> Sequence[int]:
        """Return the rank of each of a target's layers, 0 where it has none.

        Raises:
            ValueError: `ranks` or `alphas` are those of another depth.
        """
        default = self.rank if target in self.targets else 0
        ranks = self.ranks.get(target, (default,) * num_layers)
        for given in (ranks, self.alphas.get(target, ranks)):
            if len(given) != num_layers:
                raise ValueError(
                    f"Ranks and alphas are lists of one a layer. Received: "
                    f"{given} for the {num_layers} layers of {target!r}."
                )
        return ranks

    def scales(self, target: str, num_layers: int) -> np.ndarray:
        """Return the numbers that each layer's adapter is multiplied with."""
        ranks = np.array(self.ranks_of(target, num_layers))
        divisor = np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        alphas = self.alphas.get(target, (self.alpha,) * num_layers)
        return np.where(ranks, np.array(alphas) / divisor, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, as a JSON file has them.

        What only some adapters have is left out of the others'.
        """
        values: dict[str, Any] = asdict(self) | {"targets": list(self.targets)}
        for name in ("ranks", "alphas"):
            tuples = values[name].items()
            values[name] = {target: list(row) for target, row in tuples}
        rare = ("dora", "bias", "ranks", "alphas")
        return {
            name: value
            for name, value in values.items()
            if value or name not in rare
        }
