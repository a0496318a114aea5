"""Low-rank adapters of a backbone: made, switched, read, written, merged."""

import contextlib
import dataclasses
import math

import numpy as np
from keras import ops

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import peft
from keras_paligemma.checkpoints.float_views import float_views
from keras_paligemma.compat import process
from keras_paligemma.compat import wait_for_all
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.projection import normal
from keras_paligemma.models.turns import alone

LORA_TARGETS = (*peft.DECODER, *peft.VISION)
_ATTENTION = ("query", "key", "value", "output")
# A part of the model stands for its projections.
GROUPS = {
    "decoder": tuple(peft.DECODER),
    "decoder.attention": _ATTENTION,
    "decoder.mlp": ("gate", "up", "down"),
    "vision": tuple(peft.VISION),
    "vision.attention": tuple(f"vision.{one}" for one in _ATTENTION),
    "vision.mlp": ("vision.up", "vision.down"),
    "all": LORA_TARGETS,
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is, without its values.

    Args:
        rank: int.
        alpha: float or `None` for the rank.
        targets: names of projections or of `GROUPS`; those of the decoder's
            attention if `None`.
        dropout: float, share of an adapter's inputs dropped in training.
        rslora: bool, scale by alpha / √rank in place of alpha / rank, so that
            large ranks learn as fast as small ones.

    Source: https://arxiv.org/abs/2106.09685 and, of the other scale,
        https://arxiv.org/abs/2312.03732.
    """

    rank: int
    alpha: float | None = None
    targets: tuple | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"The rank is a positive integer. Received: {self.rank!r}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                "Dropout is a share of at least 0 and below 1. Received: "
                f"{self.dropout!r}."
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
        object.__setattr__(self, "alpha", self.alpha or self.rank)

    def scale(self):
        """Give the number that the adapter's product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def config(self):
        """Give plain numbers and strings, as a preset's file holds them."""
        return dataclasses.asdict(self) | {"targets": list(self.targets)}

    def place(self, target):
        """Give the name of a target's weights, without their last part."""
        tower, known = "text_decoder", peft.DECODER
        if target in peft.VISION:
            tower, known = "vision_encoder", peft.VISION
        return f"{tower}/blocks/{known[target][0]}"


class Adapters:
    """The named adapters of a backbone, one of which its variables hold.

    The first one makes the variables, the slots; the values of the others wait
    on the host. A switch copies values and one number a projection, so that
    nothing is compiled again; an adapter of a lower rank or of fewer targets
    leaves the rest of the slots zero, where gradients are zero too. Compile
    before another adapter is trained: the optimizer's moments are the last's.

    Args:
        backbone: `PaliGemmaBackbone`.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self.turns = backbone.turns
        self.slots = None
        self.known = {}
        self.live = None
        self.active = None
        self.merged = None
        self._waiting = {}

    @alone
    def add(self, name, lora, values=None):
        """Add an adapter and switch to it.

        Args:
            name: str.
            lora: `Lora`.
            values: dict of name to array, layer axis first; random A and zero
                B if `None`.
        """
        self._refuse_merged()
        if name in self.known:
            raise ValueError(
                f"There is an adapter of the name {name!r} already: "
                f"{self.known[name]}. Give another name."
            )
        if self.slots is None:
            self._make_slots(lora)
            if values is not None:
                self._assign(values)
            self.known[name], self.live, self.active = lora, name, name
            return
        if lora.rank > self.slots.rank or not set(lora.targets) <= set(
            self.slots.targets
        ):
            raise ValueError(
                "Adapters share the room that the first one made. Received: "
                f"{name!r} of {lora}. Expected: at most rank "
                f"{self.slots.rank} and targets among {self.slots.targets}. "
                "Load the preset again and add the largest adapter first."
            )
        self._waiting[self.live] = self._read()
        self._assign(self._random(lora) if values is None else values)
        self.known[name], self.live = lora, name
        self.select(name)

    @alone
    def select(self, name):
        """Switch to an adapter, or all off with `None`."""
        self._check_selectable(name)
        self._switch(self.live if name is None else name, name)

    @contextlib.contextmanager
    def using(self, name):
        """Answer with an adapter, or the bare model, and switch back.

        Other threads wait until then, a `fit` too, which goes on with the
        adapter that it trains.

        Args:
            name: str, or `None` for the bare model.

        Example:

        ```python
        with model.adapters.using("ghosts"):
            model.generate({"images": picture, "prompts": "caption en"})
        ```
        """
        with self.turns:
            before = self.live, self.active
            self._check_selectable(name)
            self._switch(self.live if name is None else name, name)
            try:
                yield
            finally:
                self._switch(*before)

    def _switch(self, live, active):
        """Put an adapter into the slots, and choose which one answers."""
        if self.slots is None:
            return
        if live != self.live:
            before = self._waiting[self.live] = self._read()
            try:
                self._assign(self._waiting[live])
            except BaseException:
                self._assign(before)
                raise
            self.live = live
            del self._waiting[live]
        self.active = active
        scale = 0.0 if active is None else self.known[active].scale()
        self._assign_scale(scale)

    def values(self, name):
        """Give an adapter's arrays, layer axis first, cut to its rank."""
        lora, held = self.known[name], self.held(name)
        cut = {}
        for target in lora.targets:
            place = lora.place(target)
            a, b = held[f"{place}/adapter_a"], held[f"{place}/adapter_b"]
            cut[f"{place}/adapter_a"] = a[..., : lora.rank]
            cut[f"{place}/adapter_b"] = b[:, : lora.rank]
        return cut

    def held(self, name):
        """Give an adapter's arrays as the slots hold them: filled up by 0."""
        return self._read() if name == self.live else self._waiting[name]

    def slots_by_name(self, *halves):
        """Map names to the variables of the slots, as the backbone does."""
        weights = self.backbone.weights_by_name()
        return {
            name: weights[name]
            for target in self.slots.targets
            for half in halves
            for name in [f"{self.slots.place(target)}/{half}"]
        }

    def config(self):
        """Describe the adapter in use as a preset's file does.

        Returns:
            Dict, or `None`: there is none, all are off, or it is merged.
        """
        if self.active is None or self.merged is not None:
            return None
        lora = self.known[self.live]
        if (lora.rank, lora.targets) != (self.slots.rank, self.slots.targets):
            lora = dataclasses.replace(
                self.slots, alpha=lora.scale() * self.slots.rank, rslora=False
            )
        return lora.config()

    @alone
    def merge(self):
        """Add the active adapter to the kernels, and switch it off."""
        self._refuse_merged()
        if self.active is None:
            raise ValueError(
                "There is no active adapter to merge. Expected: "
                "`enable_lora` or `load_adapter` first."
            )
        if self.backbone.quantization is not None:
            raise ValueError(
                "Kernels of few bits cannot take an adapter up: most of it is "
                "smaller than their steps. Received: a model of "
                f"{self.backbone.quantization}. Load the preset without "
                "`quantize`, add the adapter with `load_adapter`, and merge."
            )
        self._add_to_kernels(self.known[self.active].scale())
        self._assign_scale(0.0)
        self.merged = self.active

    @alone
    def unmerge(self):
        """Take the merged adapter out of the kernels again."""
        if self.merged is None:
            raise ValueError(
                "No adapter is merged. Expected: `adapters.merge()` first."
            )
        self._add_to_kernels(-self.known[self.merged].scale())
        self._assign_scale(self.known[self.merged].scale())
        self.merged = None

    def _check_selectable(self, name):
        self._refuse_merged()
        if name is not None and name not in self.known:
            raise ValueError(
                f"Unknown adapter. Received: {name!r}. Expected one of "
                f"{list(self.known)}, or None for the bare model."
            )

    def _refuse_merged(self):
        if self.merged is not None:
            raise ValueError(
                f"The adapter {self.merged!r} is merged into the kernels. Call "
                "`adapters.unmerge()` first."
            )

    def _make_slots(self, lora):
        for variable in self.backbone.variables:
            variable.trainable = False
        for tower, prefix in (
            (self.backbone.text_decoder, ""),
            (self.backbone.vision_encoder, "vision."),
        ):

            def adapt(block, prefix=prefix):
                for layer in block._flatten_layers():
                    if (
                        isinstance(layer, Projection)
                        and prefix + layer.name in lora.targets
                    ):
                        layer.add_adapter(lora.rank, lora.scale(), lora.dropout)

            chosen = [one.startswith("vision.") for one in lora.targets]
            if bool(prefix) in chosen:
                tower.blocks.change(adapt)
                if lora.dropout:
                    tower.blocks.enable_dropout()
        self.slots = lora

    def _read(self):
        halves = self.slots_by_name("adapter_a", "adapter_b")
        return {name: _to_array(one) for name, one in halves.items()}

    def _assign(self, values):
        slots = self.slots_by_name("adapter_a", "adapter_b")
        for name, weight in slots.items():
            whole = np.zeros(engine.shape_of(weight), "float32")
            if name in values:
                value = np.asarray(values[name])
                whole[tuple(slice(size) for size in value.shape)] = value
            _assign(weight, whole)

    def _assign_scale(self, scale):
        for weight in self.slots_by_name("adapter_scale").values():
            shape = engine.shape_of(weight)
            _assign(weight, np.full(shape, scale, "float32"))

    def _random(self, lora):
        """Draw each layer's A as a new adapter has it; B is zero."""
        weights = self.slots_by_name("adapter_a")
        values = {}
        for target in lora.targets:
            name = f"{lora.place(target)}/adapter_a"
            layers, *inputs, _ = engine.shape_of(weights[name])
            # A new initializer a layer: one draws the same each time.
            draws = [normal(math.prod(inputs)) for _ in range(layers)]
            values[name] = np.stack(
                [
                    ops.convert_to_numpy(draw((*inputs, lora.rank)))
                    for draw in draws
                ]
            )
        return values

    def _add_to_kernels(self, scale):
        weights = self.backbone.weights_by_name()
        for target in self.slots.targets:
            place = self.slots.place(target)
            kernel, a, b = (
                weights[f"{place}/{one}"]
                for one in ("kernel", "adapter_a", "adapter_b")
            )
            if isinstance(kernel, list):
                for one in zip(kernel, a, b, strict=True):
                    one[0].assign(_with_product(*one, scale))
            else:
                # A layer at a time: the stack is never whole in float32.
                stacks = [one.value for one in (kernel, a, b)]
                kernel.assign(
                    ops.map(lambda one: _with_product(*one, scale), stacks)
                )


def _with_product(kernel, a, b, scale):
    """Add scale · A · B to a kernel, in float32 before it is rounded."""
    rank = a.shape[-1]
    product = ops.matmul(ops.reshape(a, (-1, rank)), ops.reshape(b, (rank, -1)))
    product = ops.reshape(product * scale, kernel.shape)
    whole = ops.cast(kernel, "float32") + product
    return ops.cast(whole, kernel.dtype)


def _to_array(weight):
    if isinstance(weight, list):
        return np.stack([engine.to_numpy(one) for one in weight])
    return engine.to_numpy(weight)


def _assign(weight, value):
    if isinstance(weight, list):
        for variable, one in zip(weight, value, strict=True):
            variable.assign(one)
    else:
        weight.assign(value)


def load(backbone, folder, name):
    """Add adapters from a folder; see `PaliGemmaBackbone.load_adapter`."""
    config, rows, open_files = peft.read(folder)
    lora = Lora(**config)
    if backbone.adapters.slots is not None:
        # Dropout is how the slots train; it is no property of values.
        dropout = backbone.adapters.slots.dropout
        lora = dataclasses.replace(lora, dropout=dropout)
    weights = float_views(backbone.weights_by_name())
    with open_files() as tensors:
        # Compared before anything is added, so that what does not fit
        # changes nothing.
        halves = {
            row.ours: np.empty(_half_shape(row, weights, lora.rank), "float32")
            for row in rows
        }
        engine.check(halves, rows, tensors.shapes)
        for row in rows:
            half = halves[row.ours]
            for layer, key in enumerate(row.keys(len(half))):
                half[layer] = row.read(tensors.read(key), half.shape[1:])
    backbone.adapters.add(name, lora, halves)


def _half_shape(row, weights, rank):
    """Give the shape of an adapter's half, layer axis first."""
    place, half = row.ours.rsplit("/", 1)
    layers, *kernel = engine.shape_of(weights[f"{place}/kernel"])
    axes = len(row.axes.split("->")[1].split()) - 1
    if half == "adapter_a":
        return (layers, *kernel[:axes], rank)
    return (layers, rank, *kernel[-axes:])


def save(backbone, folder, name=None, base=None):
    """Write one adapter; see `PaliGemmaBackbone.save_adapter`."""
    adapters = backbone.adapters
    name = name or adapters.live
    if name not in adapters.known:
        raise ValueError(
            f"There is no such adapter to write. Received: {name!r}. Expected "
            f"one of {list(adapters.known)}; `enable_lora` or `load_adapter` "
            "make one, `save_to_preset` writes the whole model."
        )
    lora = adapters.known[name]
    rows = peft.rows(lora.targets)
    # Gathered by all processes, written by the first.
    arrays = engine.write(adapters.values(name), rows, lambda array: array)
    if process()[0] == 0:
        peft.write(folder, lora.config(), arrays, base)
    wait_for_all("an adapter is written")
