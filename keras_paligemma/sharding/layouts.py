"""Which mesh axis splits which axis of a weight: a table and one rule.

A mesh has two axes. Chips along "model" form a group; "batch" counts the
groups. Four strategies decide what a group shares:

"data"      nothing: every chip holds all weights
"weights"   storage: a group splits the weights and gathers a layer's when it
            is used; each chip has examples of its own (FSDP)
"tensor"    work: a group splits each example's heads, MLP and vocabulary
"both"      tensor within a group; the storage is also split across groups
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import ml_dtypes  # noqa: F401, registers bfloat16 with NumPy.
import numpy as np
from keras import distribution

from keras_paligemma.compat import process
from keras_paligemma.layers.stack import stable_name

STRATEGIES = ("data", "weights", "tensor", "both")

# Axes by the letters of `layers.attention`; M is the decoder's width in the
# projector, r an adapter's rank, and p q c a patch's pixels and channels.
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
# Weights of a projection. The scales of quantised storage have the kernel's
# axes in other sizes.
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

# Axes that tensor parallelism splits: their parts are independent.
SPLIT = ("V", "N", "K", "F")
# Axes whose storage is split: the first that divides, never an adapter's rank.
# Not by size, since a quantised kernel and its scales must be split alike.
STORED = ("V", "F", "D", "M", "I", "H", "N", "K")
# Weights of fewer values per layer are replicated: the saved memory would not
# be worth the time to gather them.
SMALL = 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """A strategy and the shape of its mesh.

    Args:
        strategy: str, "data", "weights", "tensor" or "both".
        groups: int, number of groups.
        group: int, chips per group.
        small: int, weights of fewer values per layer are not split for
            storage.

    Raises:
        ValueError: an unknown strategy, or a mesh without chips.

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
        shape = (self.groups, self.group)
        if not all(isinstance(n, Integral) and n > 0 for n in shape):
            raise ValueError(
                f"A mesh has a shape of positive integers. Received: {shape}. "
                "Expected: (groups, chips per group)."
            )

    def __str__(self):
        return f"{self.strategy} {self.groups}x{self.group}"

    @property
    def chips(self) -> int:
        return self.groups * self.group

    @property
    def replicas(self) -> int:
        """Number of parts that the batch is split into."""
        return self.groups if self.splits_work else self.chips

    @property
    def splits_work(self) -> bool:
        """Whether the chips of a group share the work on each example."""
        return self.strategy in ("tensor", "both")

    @property
    def tensor_chips(self) -> int:
        """Number of chips that share the work on one example."""
        return self.group if self.splits_work else 1

    @property
    def storage_chips(self) -> int:
        """Number of chips that a weight is split over and gathered from."""
        return {"weights": self.group, "both": self.groups}.get(
            self.strategy, 1
        )

    def axes(self, name: str, shape: Sequence[int]) -> tuple[str | None, ...]:
        """Return the mesh axis that splits each axis of a variable.

        Args:
            name: str, as `stable_name` returns it.
            shape: tuple of ints; for blocks, with or without the layer axis.

        Returns:
            Tuple of "batch", "model" or `None`, one per axis.

        Raises:
            ValueError: the name is not in the table.
        """
        # Scalars, such as steps, rates and metrics, cannot be split.
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
            split = [i for i, letter in enumerate(letters) if letter in SPLIT]
            _choose(chosen, sizes, split, self.group, "model")
        if large and "model" not in chosen and self.strategy != "data":
            # Split storage, also of weights whose heads do not divide.
            _choose(chosen, sizes, _stored(letters), self.group, "model")
        if large and self.strategy == "both":
            _choose(chosen, sizes, _stored(letters), self.groups, "batch")
        return (None,) * stacked + tuple(chosen)


def axes_of(name):
    """Return the letters of a variable's axes, or `None` if it is unknown."""
    if name in TABLE:
        return TABLE[name]
    # Seeds of dropout and sampling are two integers.
    if name.endswith("seed_generator_state"):
        return ["s"]
    # Optimizer variables have the weight's name with "_" for "/".
    found = re.search(_IN_OPTIMIZERS, name)
    if found is None:
        return None
    return TABLE[_FLAT[re.sub(r"blocks_\d+_block_", "blocks_", found[1])]]


_FLAT = {name.replace("/", "_"): name for name in TABLE}
_IN_OPTIMIZERS = "({})_[a-z]".format(
    "|".join(
        flat.replace("_blocks_", r"_blocks_(?:\d+_block_)?")
        for flat in sorted(_FLAT, key=len, reverse=True)
    )
)


def _stored(letters):
    """Return the axes whose storage may be split, in order of preference."""
    order = [i for i, letter in enumerate(letters) if letter in STORED]
    return sorted(order, key=lambda i: STORED.index(letters[i]))


def _choose(chosen, sizes, order, parts, axis):
    """Assign a mesh axis to the first free axis that divides into parts."""
    if parts == 1:
        return
    for i in order:
        if chosen[i] is None and sizes[i] % parts == 0:
            chosen[i] = axis
            return


class Sharded(distribution.ModelParallel):
    """A `keras.distribution` that follows a `Layout`.

    A variable that is in neither the table nor `layout_map` is an error:
    replicating it silently could exceed the memory.

    Args:
        layout: `Layout`.
        devices: list of devices, as many as the mesh has; all if `None`.

    Raises:
        ValueError: the number of devices does not match the layout.
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
        # Each process loads its part of a batch, as `data.Batches` does.
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
        # Processes that share a replica load the same examples.
        size = data_shape[0] * min(self.num_processes, self.layout.replicas)
        check_batch(size, self.layout.replicas, self.layout)
        rest = [None] * (len(data_shape) - 1)
        if self.layout.replicas == self.layout.groups:
            return distribution.TensorLayout(["batch", *rest], self.device_mesh)
        return _OverBothAxes(["batch", *rest], self.device_mesh)


class _OverBothAxes(distribution.TensorLayout):
    """Data split over both mesh axes, which Keras's layouts cannot express."""

    @property
    def backend_layout(self):
        import jax  # No other backend has layouts.

        _, *rest = self.axes
        spec = jax.sharding.PartitionSpec(("batch", "model"), *rest)
        mesh = self.device_mesh.backend_mesh
        return jax.sharding.NamedSharding(mesh, spec)


def check_batch(batch_size, replicas, layout):
    """Check that the batch divides evenly over the replicas."""
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
    """Return a distribution for `keras.distribution.set_distribution`.

    Args:
        strategy: str, what a group of chips shares: "data", nothing; "weights",
            the storage of weights; "tensor", the work on each example; "both",
            the work, while all groups share the storage.
        shape: tuple (groups, chips per group); one group if `None`, or one
            chip per group for "data".
        devices: list of str, device names such as "tpu:0"; all if `None`.
        small: int, see `Layout`.

    Returns:
        `keras.distribution.DataParallel` for "data", else `Sharded`.

    Raises:
        ValueError: an unknown strategy, a mesh that does not match the
            devices, or devices that are no list.

    Example:

    ```python
    keras.distribution.set_distribution(distribute("weights", (2, 4)))
    model = PaliGemmaCausalLM.from_preset("pali_gemma2_pt_10b_448")
    ```
    """
    devices = listed(devices)
    if shape is None:
        shape = (len(devices), 1) if strategy == "data" else (1, len(devices))
    if np.shape(shape) != (2,):
        raise ValueError(
            f"A mesh has two axes. Received: shape={shape!r}. Expected: "
            f"(groups, chips per group), such as (1, {len(devices)})."
        )
    sharded = Sharded(Layout(strategy, *shape, small), devices)
    if strategy != "data":
        return sharded
    mesh = distribution.DeviceMesh(
        (len(devices),), ["batch"], np.array(devices)
    )
    return distribution.DataParallel(mesh, auto_shard_dataset=False)


def listed(devices):
    """Return a list of devices; all if `None`."""
    if isinstance(devices, str):
        raise ValueError(
            f"Devices are a list. Received: devices={devices!r}. Expected: "
            f"devices=[{devices!r}]."
        )
    return distribution.list_devices() if devices is None else list(devices)


def data_shard() -> tuple[int, int]:
    """Return the part of the data that this process reads.

    Hosts whose chips belong to the same tensor-parallel group read the same
    examples; all others read different ones. The batch size of `Batches` is
    then the global batch size divided by the count.

    Returns:
        Tuple of int (index, count), the `shard` of `Batches`.

    Example:

    ```python
    index, count = data_shard()
    Batches(source, preprocessor, 32 // count, shard=(index, count))
    ```
    """
    index, processes = process()
    chosen = distribution.distribution()
    parts = processes
    if chosen is not None:
        parts = min(processes, chosen.num_model_replicas)
    return index * parts // processes, parts


def chip_bytes(layout, variables):
    """Return the bytes of variables on one chip.

    Args:
        layout: `Layout`.
        variables: list of `keras.Variable`.

    Returns:
        int.
    """
    parts = {"model": layout.group, "batch": layout.groups, None: 1}
    total = 0
    for variable in variables:
        axes = layout.axes(stable_name(variable.path), tuple(variable.shape))
        split = math.prod(parts[axis] for axis in axes)
        total += (
            math.prod(variable.shape)
            * np.dtype(variable.dtype).itemsize
            // split
        )
    return total
