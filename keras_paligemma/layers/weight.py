"""One named weight of a model, in either form of its layers."""

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

    Unrolled blocks have a variable each; scanned blocks share one with a layer
    axis. A quantised weight is stored as integers and scales. On a CPU, kernels
    have their outputs first. This class hides the difference from code
    that loads, saves, freezes or adapts weights: there is one shape, with the
    layer axis first for weights of blocks. Nothing is copied until it is read.

    Args:
        variables: tuple of Keras variables: one per layer of unrolled blocks,
            else a single variable. A weight that is only read may have NumPy
            arrays instead.
        form: "scanned" or "unrolled", the form of the blocks; `None` outside
            of them, for one layer without a layer axis.
        scales: tuple of the variables of the scales, to read and assign
            integers as floats; empty to use values as they are stored.

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
        """Number of layers that share the name; 1 outside of the blocks."""
        if self._layer_axes:
            return self.variables[0].shape[0]
        return len(self.variables)

    @property
    def layer_shape(self):
        """Shape of one layer."""
        if self.quantized_format is not None:
            return self.quantized_format.shape
        variable = self.variables[0]
        shape = tuple(variable.shape)[self._layer_axes :]
        first = _outputs_first(variable)
        return shape[first:] + shape[:first]

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
        """Make the variables trainable, or freeze them."""
        for variable in self.variables:
            variable.trainable = value

    def layers(self):
        """Yield each layer's tensor, sliced and dequantised on demand."""
        layout = self.quantized_format
        for number in range(self.num_layers):
            tensor, *scale = (
                self._slice(variables, number) for variables in self._stored
            )
            if layout is not None:
                tensor = layout.dequantize(tensor, *scale, "float32")
            yield tensor

    def read(self):
        """Return the values as a NumPy array of `shape`.

        Every process of a distributed run must call it, in the same order:
        see `compat.to_host`.
        """
        if self.is_one_array:
            variable = self.variables[0]
            return inputs_first(to_host(variable), variable, self._layer_axes)
        arrays = list(self.read_layers())
        return arrays[0] if self.form is None else np.stack(arrays)

    def read_layers(self):
        """Return an iterator of the NumPy array of each layer."""
        if self.form == "scanned" and self.is_one_array:
            return iter(self.read())
        return map(to_host, self.layers())

    def assign(self, value):
        """Assign a value.

        Args:
            value: array of `shape`; floats are quantised if the weight has
                `scales`.

        Raises:
            ValueError: another shape.
        """
        self._check_shape(value, self.shape)
        if self.is_one_array:
            variable = self.variables[0]
            fill(variable, as_variable(value, variable, self._layer_axes))
        else:
            self.assign_layers([value] if self.form is None else value)

    def assign_layers(self, arrays):
        """Assign each layer a value, from an iterable of one array per layer.

        Arrays are consumed one at a time. Scanned layers are stacked on the
        host, as they are stored.
        """
        write = self.layer_writer()
        for number, array in zip(range(self.num_layers), arrays, strict=True):
            self._check_shape(array, self.layer_shape)
            write(number, *self._encode(array))

    def layer_writer(self):
        """Return a function that stores layers, each once, in any order.

        Its arguments are the layer's index and its arrays as they are stored:
        the values, or integers and scale. Scanned layers are collected on the
        host until the last one, since their variables are assigned whole.
        """
        stored = self._stored
        if self.form != "scanned":

            def write(number, *arrays):
                for variables, array in zip(stored, arrays, strict=True):
                    variable = variables[number]
                    fill(variable, as_variable(array, variable))

            return write
        stacks = [
            np.empty(array.shape, np.dtype(array.dtype)) for (array,) in stored
        ]
        missing = set(range(self.num_layers))

        def write(number, *arrays):
            for stack, array, (variable,) in zip(
                stacks, arrays, stored, strict=True
            ):
                stack[number] = as_variable(array, variable)
            missing.discard(number)
            if not missing:
                for (variable,) in stored:
                    # Free each stack once it is assigned.
                    fill(variable, stacks.pop(0))

        return write

    def update(self, function, *others):
        """Apply a function to each layer, on the device.

        Args:
            function: takes a layer's tensor, and that of each of `others`;
                returns the new tensor.
            *others: weights of the same form.
        """
        weights = (self, *others)
        first = self.variables[0]

        def changed(*layers):
            variables = (weight.variables[0] for weight in weights)
            layers = map(inputs_first, layers, variables)
            return as_variable(function(*layers), first)

        if self.form == "scanned":
            # One layer at a time: no float32 copy of the whole stack.
            stacks = [weight.variables[0].value for weight in weights]
            first.assign(ops.map(lambda layer: changed(*layer), stacks))
            return
        layers = zip(*(weight.variables for weight in weights), strict=True)
        for variables in layers:
            variables[0].assign(changed(*variables))

    @property
    def _layer_axes(self):
        """Number of layer axes of a variable: 1 if it holds all layers."""
        return int(self.form == "scanned")

    @property
    def _stored(self):
        """The stored variables: values, or integers and scales."""
        return (
            (self.variables, self.scales) if self.scales else (self.variables,)
        )

    def _slice(self, variables, number):
        scanned = self.form == "scanned"
        variable = value = variables[0 if scanned else number]
        if isinstance(variable, keras.Variable):
            value = variable.value
        return inputs_first(value[number] if scanned else value, variable)

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


def _outputs_first(variable):
    """Return the number of output axes that come first; 0 for none."""
    return getattr(variable, "outputs_first", 0)


def inputs_first(array, variable, layers=0):
    """Return a variable's values with the axes in the order of files.

    Args:
        array: NumPy array or tensor, of the variable or one of its layers.
        variable: Keras variable, or an array in its place.
        layers: int, number of layer axes of the array.
    """
    return _moved(array, _outputs_first(variable), layers)


def as_variable(array, variable, layers=0):
    """Return an array with a variable's order of axes; see `inputs_first`."""
    first = _outputs_first(variable)
    return _moved(array, first and len(array.shape) - layers - first, layers)


def _moved(array, count, layers):
    """Move the first `count` axes behind the layers to the end."""
    if not count:
        return array
    axes = list(range(len(array.shape)))
    behind = layers + count
    axes = axes[:layers] + axes[behind:] + axes[layers:behind]
    if isinstance(array, np.ndarray):
        return array.transpose(axes)
    return ops.transpose(array, axes)


def dequantized(weights):
    """Return a model's weights with the names of a float checkpoint.

    Args:
        weights: dict of name to `Weight`, as they are stored.

    Returns:
        The same dict without the entries of scales. Quantised weights are
        dequantised when read and quantised when assigned.
    """
    floats = {}
    for name, weight in weights.items():
        scale = weights.get(f"{name}_scale")
        if scale is not None:
            floats[name] = dataclasses.replace(weight, scales=scale.variables)
        elif name.removesuffix("_scale") not in weights.keys() - {name}:
            floats[name] = weight
    return floats
