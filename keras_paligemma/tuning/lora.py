"""What a low-rank adapter is, without its values."""

import dataclasses

import numpy as np

from keras_paligemma.checkpoints import peft

LORA_TARGETS = tuple(peft.TARGETS)
_VISION = tuple(one for one in LORA_TARGETS if one.startswith("vision."))
_ATTENTION = ("query", "key", "value", "output")
_MLP = ("gate", "up", "down")
# A part of the model stands for its projections.
GROUPS = {
    "decoder": (*_ATTENTION, *_MLP),
    "decoder.attention": _ATTENTION,
    "decoder.mlp": _MLP,
    "vision": _VISION,
    "vision.attention": tuple(f"vision.{one}" for one in _ATTENTION),
    "vision.mlp": ("vision.up", "vision.down"),
    "all": LORA_TARGETS,
    # PEFT's name of them.
    "all-linear": LORA_TARGETS,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is, without its values.

    Args:
        rank: int, the largest of its layers.
        alpha: float or `None` for the rank.
        targets: names of projections or of `GROUPS`; those of the decoder's
            attention if `None`.
        dropout: float, share of an adapter's inputs dropped in training.
        rslora: bool, scale by alpha / √rank in place of alpha / rank, so that
            large ranks learn as fast as small ones.
        dora: bool, learn a gain for each output of a projection too.
        bias: bool, learn a bias for each output of a projection too.
        ranks: dict of target to the rank of each layer, 0 where it has none;
            `rank` for targets that are not there, and `None` for no dict.
        alphas: dict of target to the alpha of each layer, likewise.

    Source: https://arxiv.org/abs/2106.09685; of the other scale,
        https://arxiv.org/abs/2312.03732; of the gain,
        https://arxiv.org/abs/2402.09353.
    """

    rank: int
    alpha: float | None = None
    targets: tuple | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: bool = False
    ranks: dict | None = None
    alphas: dict | None = None

    def __post_init__(self):
        if not _is_int(self.rank) or self.rank < 1:
            raise ValueError(
                f"The rank is a positive integer. Received: {self.rank!r}."
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                "Dropout is a share of at least 0 and below 1. Received: "
                f"{self.dropout!r}."
            )
        if self.dora and self.bias:
            raise ValueError(
                "An adapter has gains or biases. Received: dora=True and "
                "bias=True. Leave one out: PEFT knows no adapter of both."
            )
        targets = self.targets or ("decoder.attention",)
        if isinstance(targets, str):
            targets = (targets,)
        unknown = sorted(set(targets) - {*GROUPS, *LORA_TARGETS})
        if unknown:
            raise ValueError(
                f"Unknown targets of LoRA. Received: {unknown}. Expected some "
                f"of {(*GROUPS, *LORA_TARGETS)}."
            )
        named = {name for one in targets for name in GROUPS.get(one, (one,))}
        ordered = tuple(name for name in LORA_TARGETS if name in named)
        object.__setattr__(self, "targets", ordered)
        alpha = self.rank if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", alpha)
        for name in ("ranks", "alphas"):
            given = getattr(self, name) or {}
            listed = {key: tuple(value) for key, value in given.items()}
            object.__setattr__(self, name, listed)
        self._check_layers()

    def _check_layers(self):
        strange = sorted({*self.ranks, *self.alphas} - {*self.targets})
        if strange:
            raise ValueError(
                "Ranks and alphas of layers are those of targets. Received: "
                f"{strange}. Expected some of {self.targets}."
            )
        for target, ranks in self.ranks.items():
            if not all(_is_int(one) and 0 <= one <= self.rank for one in ranks):
                raise ValueError(
                    f"The rank of a layer is an integer of 0 to {self.rank}. "
                    f"Received: {target!r} of {ranks}."
                )
        for alpha in (self.alpha, *sum(self.alphas.values(), ())):
            # A scale of 0 is how an adapter is turned off.
            small = np.finfo("float32").tiny * self.rank
            if not _is_number(alpha) or not small <= abs(alpha) < 1e30:
                raise ValueError(
                    "alpha is a number other than 0, its scale a float32. "
                    f"Received: {alpha!r}."
                )

    @property
    def pieces(self):
        """The names of what each projection has beside its kernel."""
        return (
            "adapter_a",
            "adapter_b",
            *(["adapter_bias"] if self.bias else []),
            *(["adapter_gain"] if self.dora else []),
        )

    def ranks_of(self, target, layers):
        """Give the rank of each of a target's layers, 0 where it has none.

        Raises:
            ValueError: `ranks` or `alphas` are those of another depth.
        """
        default = self.rank if target in self.targets else 0
        ranks = self.ranks.get(target, (default,) * layers)
        for given in (ranks, self.alphas.get(target, ranks)):
            if len(given) != layers:
                raise ValueError(
                    f"Ranks and alphas are lists of one a layer. Received: "
                    f"{given} for the {layers} layers of {target!r}."
                )
        return ranks

    def alphas_of(self, target, layers):
        """Give the alpha of each of a target's layers."""
        return self.alphas.get(target, (self.alpha,) * layers)

    def scales(self, target, layers):
        """Give the numbers that each layer's adapter is multiplied with."""
        ranks = np.array(self.ranks_of(target, layers))
        divisor = np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        scales = np.array(self.alphas_of(target, layers)) / divisor
        return np.where(ranks, scales, 0)

    def config(self):
        """Give plain numbers and strings, as a preset's file holds them.

        What only some adapters have is left out of the others'.
        """
        fields = dataclasses.asdict(self) | {"targets": list(self.targets)}
        for name in ("ranks", "alphas"):
            listed = fields[name].items()
            fields[name] = {key: list(value) for key, value in listed}
        rare = ("dora", "bias", "ranks", "alphas")
        return {
            key: value
            for key, value in fields.items()
            if value or key not in rare
        }

    def place(self, target):
        """Give the name of a target's weights, without their last part."""
        return peft.TARGETS[target]


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
