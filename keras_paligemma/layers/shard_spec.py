"""How the weights of a stack lie on chips, and reach those that need them."""

import math
from typing import Any
from typing import NamedTuple

import keras

from keras_paligemma.compat import platform


class ShardSpec(NamedTuple):
    """How chips share a tensor: the mesh, and its axes for each axis."""

    mesh: Any
    axes: tuple

    def parts(self, axis):
        """Count the parts of one axis; 1 where it is whole on each chip."""
        names = self.axes[axis] if -len(self.axes) <= axis else None
        names = (names,) if isinstance(names, str) else names or ()
        return math.prod(self.mesh.shape[name] for name in names)


def shard_spec_of(variable):
    """Say how chips share a variable that all of them need as a whole.

    Args:
        variable: `keras.Variable`, or a tensor, which nobody shares.

    Returns:
        `ShardSpec`; `None` where the variable is whole on each chip, or where
        chips work on the same examples and each needs its own part alone.
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


def gather(function, x, shares, *numbers):
    """Apply a function to what each chip has of a tensor, and gather that.

    The compiler gathers a tensor before a part is cut out of it, in each step
    of a loop again, or sends activations in place of weights.

    Args:
        function: of a tensor and numbers, to a tensor; it may drop axes in
            front, and keeps the order of the others.
        x: tensor.
        shares: `ShardSpec` of it, or `None`: the function is applied to it.
        *numbers: int scalars.

    Returns:
        Tensor, whole on each chip.
    """
    if shares is None:
        return function(x, *numbers)
    import jax  # No other backend has layouts.

    def here(x, *numbers):
        part = function(x, *numbers)
        for axis, name in enumerate(shares.axes):
            if name is not None:
                axis -= x.ndim - part.ndim
                part = jax.lax.all_gather(part, name, axis=axis, tiled=True)
        return part

    none = jax.sharding.PartitionSpec()
    return jax.shard_map(
        here,
        mesh=shares.mesh,
        in_specs=(
            jax.sharding.PartitionSpec(*shares.axes),
            *[none] * len(numbers),
        ),
        out_specs=none,
        # What is gathered does not say that it is the same everywhere.
        check_vma=False,
    )(x, *map(jax.numpy.asarray, numbers))


def as_stored(weight):
    """Keep one layer's kernel of heads laid out as the stack of all layers is.

    Its product wants the heads first. A TPU would lay out the whole stack so,
    as a copy that lives as long as the step: 0.8 GiB of a 28b on four chips.
    Where few numbers lie last, as an adapter's rank, it does better by itself:
    they would be filled up to 128.
    """
    if len(weight.shape) < 3 or weight.shape[-1] < 64 or platform() != "tpu":
        return weight
    from jax.experimental.layout import Layout
    from jax.experimental.layout import with_layout_constraint

    return with_layout_constraint(weight, Layout(tuple(range(weight.ndim))))
