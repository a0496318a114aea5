"""One named weight of a model, whatever form its layers have."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import fill
from keras_paligemma.compat import to_host


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a layer, or one weight of all blocks of a stack.

    Unrolled blocks have a variable each, scanned ones share one with a layer
    axis, and a quantised weight is integers and scales. What loads, writes,
    freezes or adapts weights sees none of that: a shape and values, with the
    layer axis first in the blocks. Nothing is copied until it is read.

    Args:
        variables: tuple of Keras variables: one a layer of unrolled blocks,
            else a single one. A weight that is only read may have NumPy
            arrays in their place.
        form: "scanned" or "unrolled", of the blocks; `None` outside of them,
            where a weight has one layer and no layer axis.
        scales: tuple of the variables of the scales, of integers that are
            read and assigned as floats; empty for values as they are stored.

    Example:
        >>> kernels = [keras.Variable(np.ones((2, 3))) for _ in range(4)]
        >>> weight = Weight(tuple(kernels), "unrolled")
        >>> weight.shape
        (4, 2, 3)
        >>> weight.assign(np.zeros((4, 2, 3)))
        >>> float(weight.read().sum())
        0.0
    """

    variables: tuple
    form: str | None = None
    scales: tuple = ()

    @property
    def num_layers(self):
        """Layers that share the name; one outside of the blocks."""
        if self.form == "scanned":
            return self.variables[0].shape[0]
        return len(self.variables)

    @property
    def layer_shape(self):
        """Shape of one layer."""
        if self.quantized_format is not None:
            return self.quantized_format.shape
        shape = tuple(self.variables[0].shape)
        return shape[1:] if self.form == "scanned" else shape

    @property
    def shape(self):
        """Shape, layer axis first in the blocks."""
        layers = () if self.form is None else (self.num_layers,)
        return (*layers, *self.layer_shape)

    @property
    def size(self):
        """Number of values."""
        return math.prod(self.shape)

    @property
    def dtype(self):
        """Name of the dtype of what `read` returns."""
        return "float32" if self.scales else str(self.variables[0].dtype)

    @property
    def quantized_format(self):
        """The `QuantizedFormat` of integers seen as floats, else `None`."""
        return self.variables[0].quantized_format if self.scales else None

    @property
    def is_one_array(self):
        """Whether its values lie in one variable, as `read` returns them."""
        return self.form != "unrolled" and not self.scales

    @property
    def trainable(self):
        """Whether a training step changes it."""
        return self.variables[0].trainable

    def set_trainable(self, value):
        """Freeze the variables, or trains them."""
        for variable in self.variables:
            variable.trainable = value

    def layers(self):
        """Yield the tensor of each layer, sliced or made a float just then."""
        layout = self.quantized_format
        for number in range(self.num_layers):
            tensor, *scale = (
                self._slice(variables, number) for variables in self._stored
            )
            if layout is not None:
                tensor = layout.dequantize(tensor, *scale, "float32")
            yield tensor

    def read(self):
        """Return the NumPy array, layer axis first in the blocks.

        Every process of a run must ask, in the same order: see
        `compat.to_host`.
        """
        if self.is_one_array:
            return to_host(self.variables[0])
        arrays = list(self.read_layers())
        return arrays[0] if self.form is None else np.stack(arrays)

    def read_layers(self):
        """Return an iterator of the NumPy array of each layer."""
        if self.form == "scanned" and self.is_one_array:
            return iter(self.read())
        return map(to_host, self.layers())

    def assign(self, value):
        """Assign another value, or the first one.

        Args:
            value: array of `shape`; floats are rounded to integers and scales
                where the weight has these.
        """
        self._check_shape(value, self.shape)
        if self.is_one_array:
            fill(self.variables[0], value)
        else:
            self.assign_layers([value] if self.form is None else value)

    def assign_layers(self, arrays):
        """Assign each layer another value, from an iterable of one array each.

        One array is asked for at a time. Scanned layers are stacked on the
        host, as they are stored.
        """
        write = self.layer_writer()
        for number, array in zip(range(self.num_layers), arrays, strict=True):
            self._check_shape(array, self.layer_shape)
            write(number, *self._encode(array))

    def layer_writer(self):
        """Return a function that stores layers, each once, in any order.

        Its arguments are the layer's number and its arrays as they are
        stored: the values, or integers and scale. Scanned layers wait on the
        host for the last of them, since their variables are assigned whole.
        """
        stored = self._stored
        if self.form != "scanned":

            def write(number, *arrays):
                for variables, array in zip(stored, arrays, strict=True):
                    fill(variables[number], array)

            return write
        stacks = [np.empty(one.shape, np.dtype(one.dtype)) for (one,) in stored]
        missing = set(range(self.num_layers))

        def write(number, *arrays):
            for stack, array in zip(stacks, arrays, strict=True):
                stack[number] = array
            missing.discard(number)
            if not missing:
                for (variable,) in stored:
                    # Let go of each once it is placed.
                    fill(variable, stacks.pop(0))

        return write

    def update(self, function, *others):
        """Replace each layer by what a function makes of it, on the device.

        Args:
            function: of the layer's tensor, and the same layer's of `others`.
            *others: weights of the same form.
        """
        weights = (self, *others)
        if self.form == "scanned":
            # A layer at a time: the stack is never whole in float32.
            stacks = [weight.variables[0].value for weight in weights]
            changed = ops.map(lambda layer: function(*layer), stacks)
            self.variables[0].assign(changed)
            return
        layers = zip(*(weight.variables for weight in weights), strict=True)
        for variables in layers:
            variables[0].assign(function(*variables))

    @property
    def _stored(self):
        """The variables of what is stored: values, or integers and scales."""
        return (
            (self.variables, self.scales) if self.scales else (self.variables,)
        )

    def _slice(self, variables, number):
        scanned = self.form == "scanned"
        value = variables[0 if scanned else number]
        value = value.value if isinstance(value, keras.Variable) else value
        return value[number] if scanned else value

    def _encode(self, array):
        if self.quantized_format is not None:
            return self.quantized_format.quantize(array)
        return (array,)

    def _check_shape(self, value, expected):
        if tuple(np.shape(value)) != expected:
            raise ValueError(
                "The value does not fit the weight. Received: an array of "
                f"shape {tuple(np.shape(value))}. Expected: {expected}."
            )


def dequantized(weights):
    """Return a model's weights as a checkpoint of floats knows them.

    Args:
        weights: dict of name to `Weight`, as they are stored.

    Returns:
        The same dict without scales. Integers are weights that are read as
        floats, and that round what they are assigned.
    """
    floats = {}
    for name, weight in weights.items():
        scale = weights.get(f"{name}_scale")
        if scale is not None:
            floats[name] = dataclasses.replace(weight, scales=scale.variables)
        elif name.removesuffix("_scale") not in weights.keys() - {name}:
            floats[name] = weight
    return floats
