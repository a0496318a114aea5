"""How the weights of a stack are sharded, and how they are gathered."""

import math
from typing import Any
from typing import NamedTuple

import keras

from keras_paligemma.compat import platform


class ShardSpec(NamedTuple):
    """The sharding of a tensor: the mesh, and mesh axes for each axis."""

    mesh: Any
    axes: tuple

    def num_shards(self, axis):
        """Return the number of shards of one axis; 1 if it is replicated."""
        names = self.axes[axis] if -len(self.axes) <= axis else None
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(self.mesh.shape[name] for name in names)


def shard_spec_of(variable):
    """Return the sharding of a variable that every device needs whole.

    Args:
        variable: `keras.Variable`, or a tensor, which is not sharded.

    Returns:
        `ShardSpec`; `None` if the variable is replicated, or under model
        parallelism, where each device needs its own shard only.
    """
    active = keras.distribution.distribution()
    if active is None or not isinstance(variable, keras.Variable):
        return None
    layout = active.get_variable_layout(variable)
    if layout is None or not any(layout.axes):
        return None
    mesh = layout.backend_layout.mesh
    if active.num_model_replicas < mesh.size:
        return None
    return ShardSpec(mesh, tuple(layout.axes))


def gather(function, x, spec, *numbers):
    """Apply a function to each device's shard of a tensor, then all-gather.

    Otherwise the compiler gathers the whole tensor in each step of a loop,
    before a part is sliced out of it, or sends activations instead of weights.

    Args:
        function: function of a tensor and `numbers` that returns a tensor; it
            may drop leading axes, and keeps the order of the others.
        x: tensor.
        spec: `ShardSpec` of `x`; `None` if `x` is replicated.
        *numbers: int scalars.

    Returns:
        Tensor, replicated on all devices.
    """
    if spec is None:
        return function(x, *numbers)
    import jax  # No other backend has layouts.

    def here(x, *numbers):
        part = function(x, *numbers)
        for axis, name in enumerate(spec.axes):
            if name is not None:
                axis -= x.ndim - part.ndim
                part = jax.lax.all_gather(part, name, axis=axis, tiled=True)
        return part

    none = jax.sharding.PartitionSpec()
    return jax.shard_map(
        here,
        mesh=spec.mesh,
        in_specs=(
            jax.sharding.PartitionSpec(*spec.axes),
            *[none] * len(numbers),
        ),
        out_specs=none,
        # JAX cannot infer that an all-gather's result is replicated.
        check_vma=False,
    )(x, *map(jax.numpy.asarray, numbers))


def as_stored(weight):
    """Constrain one layer's kernel to the memory layout of the whole stack.

    The product over heads prefers another layout. A TPU would hold a copy of
    the whole stack in that layout for a step: 0.8 GiB for 28b on four chips.
    With a short last axis, such as an adapter's rank, the compiler's choice is
    better, since that axis would be padded to 128.
    """
    if len(weight.shape) < 3 or weight.shape[-1] < 64 or platform() != "tpu":
        return weight
    from jax.experimental.layout import Layout
    from jax.experimental.layout import with_layout_constraint

    return with_layout_constraint(weight, Layout(tuple(range(weight.ndim))))
