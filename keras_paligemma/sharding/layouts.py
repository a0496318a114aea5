"""Which axis of which weight lies on which chips: a table and one rule.

A mesh has two axes. Chips along "model" are a group; "batch" counts the
groups. Four strategies say what a group is for:

"data"      nothing is split: every chip holds all weights
"weights"   a group splits the storage of the weights and gathers a layer's
            when it is used; each chip has examples of its own (FSDP)
"tensor"    a group splits the work on each example: heads, MLP and vocabulary
"both"      tensor within a group; across groups the storage is split too
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401, NumPy learns bfloat16 by it.
import numpy as np
from keras import distribution

from keras_paligemma.compat import process
from keras_paligemma.layers.stack import stable_name

STRATEGIES = ("data", "weights", "tensor", "both")

# Axes by the letters of `layers.attention`; M is the decoder's width where it
# meets the vision encoder's, r an adapter's rank, p q c a patch's pixels.
PROJECTIONS = {
    "text_decoder/blocks/attention/query": "D -> N H",
    "text_decoder/blocks/attention/key": "D -> K H",
    "text_decoder/blocks/attention/value": "D -> K H",
    "text_decoder/blocks/attention/output": "N H -> D",
    "text_decoder/blocks/mlp/gate": "D -> F",
    "text_decoder/blocks/mlp/up": "D -> F",
    "text_decoder/blocks/mlp/down": "F -> D",
    "vision_encoder/patch_embedding": "p q c -> D",
    "vision_encoder/blocks/attention/query": "D -> N H",
    "vision_encoder/blocks/attention/key": "D -> N H",
    "vision_encoder/blocks/attention/value": "D -> N H",
    "vision_encoder/blocks/attention/output": "N H -> D",
    "vision_encoder/blocks/mlp/up": "D -> F",
    "vision_encoder/blocks/mlp/down": "F -> D",
    "vision_encoder/projector": "D -> M",
}
# What a projection owns; the scale of low-bit storage has the kernel's axes,
# of other sizes.
_OWNED = {
    "kernel": "{inputs} {outputs}",
    "kernel_scale": "{inputs} {outputs}",
    "bias": "{outputs}",
    "adapter_a": "{inputs} r",
    "adapter_b": "r {outputs}",
    "adapter_bias": "{outputs}",
    "adapter_gain": "{outputs}",
    "adapter_scale": "",
}
ARRAYS = {
    "text_decoder/token_embedding/table": "V D",
    "text_decoder/token_embedding/table_scale": "V D",
    "text_decoder/token_embedding/adapter_head": "V D",
    "text_decoder/blocks/pre_attention_norm/scale": "D",
    "text_decoder/blocks/post_attention_norm/scale": "D",
    "text_decoder/blocks/pre_ffw_norm/scale": "D",
    "text_decoder/blocks/post_ffw_norm/scale": "D",
    "text_decoder/final_norm/scale": "D",
    "vision_encoder/position_embedding": "I D",
    "vision_encoder/blocks/attention_norm/gamma": "D",
    "vision_encoder/blocks/attention_norm/beta": "D",
    "vision_encoder/blocks/mlp_norm/gamma": "D",
    "vision_encoder/blocks/mlp_norm/beta": "D",
    "vision_encoder/final_norm/gamma": "D",
    "vision_encoder/final_norm/beta": "D",
}
TABLE = {
    f"{projection}/{owned}": axes.format(
        inputs=product.split(" -> ")[0], outputs=product.split(" -> ")[1]
    ).split()
    for projection, product in PROJECTIONS.items()
    for owned, axes in _OWNED.items()
} | {name: axes.split() for name, axes in ARRAYS.items()}

# What tensor parallelism splits: axes whose parts do not need one another.
SPLIT = ("V", "N", "K", "F")
# Whose storage is split, the first that divides; an adapter's rank never. Not
# by size: a kernel in low bits and its scales must be split alike.
STORED = ("V", "F", "D", "M", "I", "H", "N", "K")
# Values of a layer below which a weight is copied to every chip: gathering it
# takes longer than it saves memory.
SMALL = 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """A strategy and the mesh that it is for.

    Args:
        strategy: "data", "weights", "tensor" or "both".
        groups: int, how many groups share the batch.
        group: int, chips of a group, which share the weights.
        small: int, weights of fewer values a layer are not split for their
            storage.

    Example:
        >>> layout = Layout("weights", groups=2, group=4)
        >>> layout.axes("text_decoder/blocks/mlp/up/kernel", (26, 2304, 9216))
        (None, None, 'model')
    """

    strategy: str
    groups: int = 1
    group: int = 1
    small: int = SMALL

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"Unknown strategy. Received: {self.strategy!r}. Expected one "
                f"of {STRATEGIES}."
            )

    def __str__(self):
        return f"{self.strategy} {self.groups}x{self.group}"

    @property
    def chips(self) -> int:
        return self.groups * self.group

    @property
    def replicas(self) -> int:
        """How many parts the batch is split into."""
        return self.groups if self.splits_work else self.chips

    @property
    def splits_work(self) -> bool:
        """Whether the chips of a group share the work on each example."""
        return self.strategy in ("tensor", "both")

    @property
    def tensor_chips(self) -> int:
        """How many chips share the work on one example."""
        return self.group if self.splits_work else 1

    @property
    def storage_chips(self) -> int:
        """How many chips share a weight's storage and gather it to use it."""
        return {"weights": self.group, "both": self.groups}.get(
            self.strategy, 1
        )

    def axes(self, name: str, shape: Sequence[int]) -> tuple[str | None, ...]:
        """Say which mesh axis splits each axis of a variable.

        Args:
            name: str, of `stable_name`.
            shape: tuple of ints; of blocks with the layer axis or without.

        Returns:
            Tuple of "batch", "model" or `None`, one an axis.

        Raises:
            ValueError: a name that is not in the table.
        """
        # Nothing of a number can be split: steps, rates, metrics.
        if not shape:
            return ()
        letters = axes_of(name)
        if letters is None or len(shape) - len(letters) not in (0, 1):
            raise ValueError(
                f"No layout is known for a variable. Received: {name!r} of "
                f"shape {tuple(shape)}. Add a row to "
                "keras_paligemma.sharding.layouts.TABLE, or set "
                "layout_map[its path] of this distribution to a tuple of mesh "
                "axes and None."
            )
        stacked = len(shape) - len(letters)
        sizes = shape[stacked:]
        large = math.prod(sizes) >= self.small
        chosen = [None] * len(sizes)
        if self.splits_work:
            split = [i for i, one in enumerate(letters) if one in SPLIT]
            _choose(chosen, sizes, split, self.group, "model")
        if large and "model" not in chosen and self.strategy != "data":
            # Storage, or heads that do not divide: what is summed over.
            _choose(chosen, sizes, _stored(letters), self.group, "model")
        if large and self.strategy == "both":
            _choose(chosen, sizes, _stored(letters), self.groups, "batch")
        return (None,) * stacked + tuple(chosen)


def axes_of(name):
    """Return the letters of a variable's axes, or `None` if it is unknown."""
    if name in TABLE:
        return TABLE[name]
    # Seeds of dropout and sampling: two integers.
    if name.endswith("seed_generator_state"):
        return ["s"]
    # Optimizers name their variables after the weight, "_" for "/".
    found = re.search(_IN_OPTIMIZERS, name)
    return TABLE[_FLAT[_without_number(found[1])]] if found else None


def _without_number(flat):
    return re.sub(r"blocks_\d+_block_", "blocks_", flat)


_FLAT = {name.replace("/", "_"): name for name in TABLE}
_IN_OPTIMIZERS = "({})_[a-z]".format(
    "|".join(
        flat.replace("_blocks_", r"_blocks_(?:\d+_block_)?")
        for flat in sorted(_FLAT, key=len, reverse=True)
    )
)


def _stored(letters):
    """Order axes as their storage is split."""
    order = [i for i, one in enumerate(letters) if one in STORED]
    return sorted(order, key=lambda i: STORED.index(letters[i]))


def _choose(chosen, sizes, order, parts, axis):
    """Put a mesh axis on the first free axis that divides into parts."""
    if parts == 1:
        return
    for i in order:
        if chosen[i] is None and sizes[i] % parts == 0:
            chosen[i] = axis
            return


class Sharded(distribution.ModelParallel):
    """A `keras.distribution` that follows a `Layout`.

    A variable that neither the table nor `layout_map` knows is an error: a
    silent copy on every chip is how a model that should fit does not.

    Args:
        layout: `Layout`.
        devices: list of devices, as many as the mesh has; all if `None`.
    """

    def __init__(
        self, layout: Layout, devices: Sequence[Any] | None = None
    ) -> None:
        devices = distribution.list_devices() if devices is None else devices
        if layout.chips != len(devices):
            raise ValueError(
                f"A mesh has as many chips as there are devices. Received: "
                f"{layout} for {len(devices)} devices. Expected, for groups "
                f"of {layout.group}: "
                f"{max(1, len(devices) // layout.group)}x{layout.group}, or "
                f"{layout.chips} devices."
            )
        mesh = distribution.DeviceMesh(
            (layout.groups, layout.group), ["batch", "model"], devices
        )
        self.layout = layout
        # Each process brings its part of a batch, as `data.Batches` do.
        super().__init__(
            layout_map=distribution.LayoutMap(mesh),
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )

    @property
    def layout_map(self) -> distribution.LayoutMap:
        """The user's own rules for variables that the table lacks."""
        return self._layout_map

    @property
    def num_model_replicas(self) -> int:
        return self.layout.replicas

    def get_variable_layout(self, variable: Any) -> Any:
        given = getattr(variable, "_layout", None)
        given = given or self._layout_map[variable.path]
        if given is not None:
            return given
        axes = self.layout.axes(stable_name(variable.path), variable.shape)
        return distribution.TensorLayout(axes, self.device_mesh)

    def get_data_layout(self, data_shape: Sequence[int]) -> Any:
        # Processes that share a replica bring the same examples.
        size = data_shape[0] * min(self.num_processes, self.layout.replicas)
        check_batch(size, self.layout.replicas, self.layout)
        rest = [None] * (len(data_shape) - 1)
        if self.layout.replicas == self.layout.groups:
            return distribution.TensorLayout(["batch", *rest], self.device_mesh)
        return _OverBothAxes(["batch", *rest], self.device_mesh)


class _OverBothAxes(distribution.TensorLayout):
    """Data that all chips of all groups share: Keras knows one axis alone."""

    @property
    def backend_layout(self):
        import jax  # No other backend has layouts.

        _, *rest = self.axes
        spec = jax.sharding.PartitionSpec(("batch", "model"), *rest)
        mesh = self.device_mesh.backend_mesh
        return jax.sharding.NamedSharding(mesh, spec)


def check_batch(batch_size, replicas, layout):
    """Refuse a batch that chips cannot share evenly."""
    if batch_size % replicas:
        below = batch_size // replicas * replicas
        near = f"{below} or {below + replicas}" if below else f"{replicas}"
        raise ValueError(
            f"The batch must divide by the {replicas} parts that {layout} "
            f"splits it into. Received: a batch of {batch_size}. Expected: "
            f"{near}."
        )


def distribute(
    strategy: str = "weights",
    shape: tuple[int, int] | None = None,
    devices: Sequence[Any] | None = None,
    small: int = SMALL,
) -> Sharded:
    """Make a distribution for `keras.distribution.set_distribution`.

    Args:
        strategy: "data", "weights", "tensor" or "both", see this module.
        shape: tuple (groups, chips of a group); all chips are one group if
            `None`.
        devices: list of device names such as "tpu:0"; all if `None`.
        small: int, see `Layout`.

    Returns:
        `keras.distribution.DataParallel` for "data", else `Sharded`.

    Raises:
        ValueError: a mesh that does not match the devices.

    Example:

    ```python
    keras.distribution.set_distribution(distribute("weights", (2, 4)))
    model = PaliGemmaCausalLM.from_preset("pali_gemma2_pt_10b_448")
    ```
    """
    devices = distribution.list_devices() if devices is None else list(devices)
    if shape is None:
        shape = (len(devices), 1) if strategy == "data" else (1, len(devices))
    sharded = Sharded(Layout(strategy, *shape, small), devices)
    if strategy != "data":
        return sharded
    mesh = distribution.DeviceMesh(
        (len(devices),), ["batch"], np.array(devices)
    )
    return distribution.DataParallel(mesh, auto_shard_dataset=False)


def data_shard() -> tuple[int, int]:
    """Say which part of the data this process reads, as `Batches` take it.

    Hosts whose chips are a group of tensor parallelism together bring the
    same examples; all others bring examples of their own. A batch of
    `Batches` is then the whole batch divided by the count.

    Returns:
        Tuple (index, count).

    Example:

    ```python
    index, count = data_shard()
    Batches(source, preprocessor, 32 // count, shard=(index, count))
    ```
    """
    index, processes = process()
    chosen = distribution.distribution()
    parts = processes
    if isinstance(chosen, Sharded):
        parts = min(processes, chosen.layout.replicas)
    return index * parts // processes, parts


def chip_bytes(layout, variables):
    """Count the bytes of variables on one chip.

    Args:
        layout: `Layout`.
        variables: list of `keras.Variable`.

    Returns:
        int.
    """
    parts = {"model": layout.group, "batch": layout.groups, None: 1}
    total = 0
    for one in variables:
        axes = layout.axes(stable_name(one.path), tuple(one.shape))
        split = math.prod(parts[axis] for axis in axes)
        total += math.prod(one.shape) * np.dtype(one.dtype).itemsize // split
    return total
