"""Frozen weights as 8-bit or 4-bit integers with scales.

Weights are quantised on the host, in NumPy, while a checkpoint is read, and
made floats again inside the layer that uses them. Rounding is symmetric and to
the nearest: `|w - dequantize(quantize(w))| <= scale / 2`.
"""

import dataclasses
import math

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers.remat import after
from keras_paligemma.layers.rounding import round_to

MODES = (None, "int8", "int4")
GROUP = 128
# Rows of a table that are floats at a time while it is quantised.
ROWS = 4096
# Bytes that become floats at a time, and what a part's size is a multiple of.
PART = 2**24
ALIGNED = 128


@dataclasses.dataclass(frozen=True)
class LowBit:
    """How a float array is stored as integers and scales.

    "int8" has one scale for all that one output sums up. "int4" packs two
    values into a byte and has one scale for each 128 values along the last
    axis that is summed over; a shorter axis is one group, and the last group
    of another length is filled up with zeros. A byte holds values of the same
    group, so that an axis can be sharded between groups.

    Scales are bfloat16, rounded up before the integers are chosen: their own
    rounding then costs nothing but steps that are up to 0.8 % wider, and the
    product of an integer and its scale is exact in float32.

    Args:
        mode: "int8" or "int4".
        shape: tuple of ints, of the float array.
        axes: tuple of ints, the axes that a product sums over.

    Example:
        >>> layout = LowBit("int4", (300, 8), (0,))
        >>> layout.stored_shape, layout.scale_shape
        ((192, 8), (3, 8))
    """

    mode: str
    shape: tuple
    axes: tuple

    def __post_init__(self):
        if self.mode not in MODES[1:]:
            raise ValueError(
                f"Unknown quantization. Received: {self.mode!r}. Expected one "
                f"of {MODES}."
            )
        # Counted from the end: slices and stacks have the same layout.
        axes = sorted(axis % len(self.shape) for axis in self.axes)
        axes = tuple(axis - len(self.shape) for axis in axes)
        object.__setattr__(self, "axes", axes)

    @property
    def group(self):
        """Values that share a scale of "int4": an even number."""
        size = self.shape[self.axes[-1]]
        return min(GROUP, size + size % 2)

    @property
    def groups(self):
        return -(-self.shape[self.axes[-1]] // self.group)

    @property
    def stored_shape(self):
        if self.mode == "int8":
            return self.shape
        return self._with(self.groups * self.group // 2)

    @property
    def scale_shape(self):
        if self.mode == "int4":
            return self._with(self.groups)
        shape = list(self.shape)
        for axis in self.axes:
            shape[axis] = 1
        return tuple(shape)

    def _with(self, size):
        """Give the shape with another size of the axis of groups."""
        shape = list(self.shape)
        shape[self.axes[-1]] = size
        return tuple(shape)

    def quantize(self, array, scale=None):
        """Turn a float array into integers and scales, on the host.

        Args:
            array: NumPy array of `shape`, of any float dtype.
            scale: bfloat16 array of `scale_shape`; of the peaks if `None`.

        Returns:
            int8 array of `stored_shape`, bfloat16 array of `scale_shape`.

        Raises:
            ValueError: another shape; NaN or infinity.
        """
        if tuple(array.shape) != self.shape:
            raise ValueError(
                f"Expected an array of shape {self.shape}. Received: "
                f"{tuple(array.shape)}."
            )
        stored = np.empty(self.stored_shape, "int8")
        scales = np.empty(self.scale_shape, ml_dtypes.bfloat16)
        step = len(array) if -array.ndim in self.axes else ROWS
        for start in range(0, len(array), step):
            part = slice(start, start + step)
            rows = np.asarray(array[part], "float32")
            given = None if scale is None else scale[part]
            if self.mode == "int8":
                found = round_to(rows, self.axes, 127, given)
            else:
                found = self._round_groups(rows, given)
            stored[part], scales[part] = found
        return stored, scales

    def _round_groups(self, array, scale):
        axis = self.axes[-1]
        missing = self.groups * self.group - array.shape[axis]
        if missing:
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, missing)
            array = np.pad(array, padding)
        lead, tail = _split(array.shape, axis)
        array = array.reshape(*lead, self.groups, self.group, *tail)
        scale = None if scale is None else np.expand_dims(scale, axis)
        values, scale = round_to(array, (axis,), 7, scale)
        low, high = np.split(values.view("uint8"), 2, axis)
        packed = ((low & 15) | (high << 4)).view("int8")
        return packed.reshape(*lead, -1, *tail), scale.squeeze(axis)

    def dequantize(self, stored, scale, dtype):
        """Turn integers and scales into floats, in `keras.ops`.

        Args:
            stored: int8 tensor of `stored_shape`, or with more axes before,
                or of other sizes of axes that are not summed over.
            scale: bfloat16 tensor, likewise.
            dtype: str.

        Returns:
            Tensor of `dtype`.
        """
        scale = ops.cast(scale, dtype)
        if self.mode == "int8":
            return ops.cast(stored, dtype) * scale
        axis = self.axes[-1]
        lead, tail = _split(ops.shape(stored), axis)
        stored = ops.reshape(
            stored, (*lead, self.groups, self.group // 2, *tail)
        )
        fifteen, eight = (ops.cast(one, "int8") for one in (15, 8))
        low = ops.bitwise_xor(ops.bitwise_and(stored, fifteen), eight) - eight
        high = ops.right_shift(stored, ops.cast(4, "int8"))
        values = ops.concatenate([low, high], axis=axis)
        values = ops.cast(values, dtype) * ops.expand_dims(scale, axis)
        values = ops.reshape(values, (*lead, self.groups * self.group, *tail))
        size = self.shape[axis]
        return values[(..., slice(0, size), *[slice(None)] * len(tail))]


def low_bit_product(layout, stored, scale, x):
    """Multiply with a frozen weight that is a float only for that time.

    The backward pass makes it a float anew: kept for it, the kernels of all
    layers would be floats at once.

    Args:
        layout: `LowBit`.
        stored: int8 variable or tensor, see `LowBit.dequantize`.
        scale: bfloat16, likewise.
        x: tensor (..., *axes that are summed over).

    Returns:
        Tensor (..., *other axes), of the dtype of `x`.
    """

    @ops.custom_gradient
    def product(x, stored, scale):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            back = low_bit_gradient(layout, stored, scale, upstream)
            return back, None, None

        return _forward(layout, stored, scale, x), gradient

    # Values, since the gradient is asked for when the scope of a trainer's or
    # a stack's values has ended: a variable then has others. TensorFlow takes
    # a variable for a tensor, and would hand it on as it is.
    values = (
        one.value if isinstance(one, keras.Variable) else one
        for one in (stored, scale)
    )
    return product(x, *map(ops.convert_to_tensor, values))


def low_bit_gradient(layout, stored, scale, gradient):
    """Take a gradient of `low_bit_product` back to its `x`.

    Args:
        layout: `LowBit`.
        stored: int8 tensor, see `LowBit.dequantize`.
        scale: bfloat16, likewise.
        gradient: tensor (..., *axes that were not summed over).

    Returns:
        Tensor (..., *axes that were summed over).
    """
    summed, kept = _axes(layout)

    def back(gradient, stored, scale):
        stored, scale = after(gradient, stored, scale)
        if layout.mode == "int8":
            gradient = gradient * _of_outputs(layout, scale, gradient.dtype)
            kernel = ops.cast(stored, gradient.dtype)
        else:
            kernel = layout.dequantize(stored, scale, gradient.dtype)
        return _contract(gradient, kernel, kept)

    count = _parts(layout, stored)
    if count == 1:
        return back(gradient, stored, scale)
    axis = len(gradient.shape) - len(kept)

    def add(total, number):
        part = (
            _part(gradient, axis, number, count),
            _part(stored, kept[0], number, count),
            _part(scale, kept[0], number, count),
        )
        return total + back(*part), None

    summed_shape = [layout.shape[axis] for axis in summed]
    none = ops.zeros(
        (*ops.shape(gradient)[:axis], *summed_shape), gradient.dtype
    )
    return ops.scan(add, none, ops.arange(count))[0]


def _forward(layout, stored, scale, x):
    summed, kept = _axes(layout)

    def forward(stored, scale):
        stored, scale = after(x, stored, scale)
        if layout.mode == "int8":
            # The scale of an output multiplies what was summed up: a TPU then
            # makes floats of the integers within the product.
            y = _contract(x, ops.cast(stored, x.dtype), summed)
            return y * _of_outputs(layout, scale, x.dtype)
        kernel = layout.dequantize(stored, scale, x.dtype)
        return _contract(x, kernel, summed)

    count = _parts(layout, stored)
    if count == 1:
        return forward(stored, scale)

    def part_of(number):
        return forward(
            _part(stored, kept[0], number, count),
            _part(scale, kept[0], number, count),
        )

    axis = len(x.shape) - len(summed)
    if keras.backend.backend() != "jax":
        parts = [part_of(number) for number in range(count)]
        return ops.concatenate(parts, axis=axis)
    # Written where it belongs: parts that are put together are copied.
    shape = [*ops.shape(x)[:axis], *(stored.shape[one] for one in kept)]
    starts = [0] * len(shape)

    def write(y, number):
        starts[axis] = number * (shape[axis] // count)
        return ops.slice_update(y, starts, part_of(number)), None

    return ops.scan(write, ops.zeros(shape, x.dtype), ops.arange(count))[0]


def _parts(layout, stored):
    """Count the parts of a large weight that become floats in turn.

    Of the larger kernels of a 28b, or of a table, all of them together would
    take more than the rest of a step. Parts lie along the first axis that is
    kept and are of equal size.
    """
    if layout.mode == "int8" and platform() == "tpu":
        return 1
    size = stored.shape[_axes(layout)[1][0]]
    least = -(-math.prod(stored.shape) // PART)
    for count in range(least, min(8 * least, size)):
        if size % (count * ALIGNED) == 0:
            return count
    return 1


def _part(x, axis, number, count):
    """Cut a part of an axis out."""
    if axis == 0:
        # An index of whole tiles: rows from anywhere would have a TPU lay out
        # the table anew.
        x = ops.reshape(x, (count, x.shape[0] // count, *x.shape[1:]))
        return ops.take(x, number, axis=0)
    size = x.shape[axis] // count
    starts = [0] * len(x.shape)
    starts[axis] = number * size
    shape = list(ops.shape(x))
    shape[axis] = size
    return ops.slice(x, starts, shape)


def _of_outputs(layout, scale, dtype):
    """Give scales of "int8" the shape of what a product gives."""
    return ops.cast(ops.squeeze(scale, _axes(layout)[0]), dtype)


def _axes(layout):
    """List the axes that a product sums over, and the others."""
    rank = len(layout.shape)
    summed = [rank + axis for axis in layout.axes]
    return summed, [axis for axis in range(rank) if axis not in summed]


def _contract(x, kernel, axes):
    """Sum over the last axes of `x` and these axes of a kernel."""
    last = range(len(x.shape) - len(axes), len(x.shape))
    return ops.tensordot(x, kernel, axes=[list(last), axes])


def _split(shape, axis):
    """Split a shape before and behind an axis counted from the end."""
    return tuple(shape[:axis]), tuple(shape[len(shape) + axis + 1 :])


def add_low_bit_weight(layer, layout, initializer, name):
    """Add the variables of a frozen weight to a layer: `name`, `name`_scale.

    Args:
        layer: Keras layer that is being built.
        layout: `LowBit`.
        initializer: Keras initializer of the float array. It must draw the
            same each time, as Keras's do unless given a generator.
        name: str.

    Returns:
        Two variables, int8 and bfloat16.
    """
    initializer = keras.initializers.get(initializer)

    def part(which):
        def initialize(shape, dtype=None):
            values = ops.convert_to_numpy(initializer(layout.shape, "float32"))
            part = layout.quantize(values)[which].astype("float32")
            return ops.cast(ops.convert_to_tensor(part), dtype)

        return initialize

    parts = (
        (name, layout.stored_shape, "int8"),
        (f"{name}_scale", layout.scale_shape, "bfloat16"),
    )
    stored, scale = (
        layer.add_weight(
            shape=shape,
            dtype=dtype,
            initializer=part(which),
            trainable=False,
            autocast=False,
            name=name,
        )
        for which, (name, shape, dtype) in enumerate(parts)
    )
    stored.low_bit = layout
    return stored, scale
