"""The configuration of a low-rank adapter."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING
from typing import Any

from keras_paligemma.checked import Checked
from keras_paligemma.checked import by_target
from keras_paligemma.checked import flag
from keras_paligemma.checked import number
from keras_paligemma.checked import scale
from keras_paligemma.checked import texts
from keras_paligemma.checked import whole

if TYPE_CHECKING:
    import numpy as np

# Targets of adapters, with the path of their weights.
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
# Names of parts of the model, with their projections.
GROUPS = {
    "decoder": (*_ATTENTION, *_MLP),
    "decoder.attention": _ATTENTION,
    "decoder.mlp": _MLP,
    "vision": tuple(name for name in TARGETS if name.startswith("vision.")),
    "vision.attention": tuple(f"vision.{name}" for name in _ATTENTION),
    "vision.mlp": ("vision.up", "vision.down"),
    "all": tuple(TARGETS),
    # PEFT's name for "all".
    "all-linear": tuple(TARGETS),
}


@dataclass(frozen=True)
class LoraConfig(Checked):
    """A low-rank adapter: the arguments of `enable_lora` with defaults set.

    Args:
        rank: int, the largest rank of all layers.
        alpha: float; the adapter is scaled by alpha / rank. `None` for `rank`.
        targets: names of projections, keys of `TARGETS` or of `GROUPS`;
            `None` for the decoder's attention.
        dropout: float, dropout rate of the adapter's inputs in training.
        rslora: bool, scale by alpha / √rank, so that large ranks learn as
            fast as small ones.
        dora: bool, a learned gain for each output of a projection.
        bias: bool, a learned bias for each output of a projection.
        ranks: dict of target to the rank of each layer, 0 for layers without
            an adapter; other targets have `rank`.
        alphas: dict of target to the alpha of each layer, likewise.

    Raises:
        ValueError: invalid fields, unknown targets, or both `dora` and `bias`.

    Example:

    >>> lora = LoraConfig(4, targets=["decoder.mlp"])
    >>> lora.targets, lora.alpha
    (('gate', 'up', 'down'), 4)

    Source: LoRA, https://arxiv.org/abs/2106.09685; rsLoRA,
        https://arxiv.org/abs/2312.03732; DoRA,
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
            # A scale of 0 means that an adapter is turned off.
            if not all(1e-30 <= abs(alpha) <= 1e30 for alpha in alphas):
                raise ValueError(
                    "The alpha of a layer is a number other than 0 whose size "
                    f"a float32 holds. Received: {target!r} of {alphas}."
                )

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the adapter's weights in each projection."""
        return (
            "adapter_a",
            "adapter_b",
            *(["adapter_bias"] if self.bias else []),
            *(["adapter_gain"] if self.dora else []),
        )

    def ranks_of(self, target: str, num_layers: int) -> Sequence[int]:
        """Return the rank of each layer of a target, 0 without an adapter.

        Args:
            target: str, a key of `TARGETS`.
            num_layers: int, number of the target's layers.

        Raises:
            ValueError: `ranks` or `alphas` have another number of layers.
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

    def scales(self, target: str, num_layers: int) -> "np.ndarray":
        """Return the scale of each layer's adapter, an array (num_layers,)."""
        # Imported here: the command line reads this file for its help.
        import numpy as np

        ranks = np.array(self.ranks_of(target, num_layers))
        divisor = np.maximum(np.sqrt(ranks) if self.rslora else ranks, 1)
        alphas = self.alphas.get(target, (self.alpha,) * num_layers)
        return np.where(ranks, np.array(alphas) / divisor, 0)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values for JSON.

        Rare fields (`dora`, `bias`, `ranks`, `alphas`) are omitted if unset.
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
