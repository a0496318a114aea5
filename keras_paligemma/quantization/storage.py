"""Frozen weights as 8-bit or 4-bit integers with scales.

Weights are quantised on the host, in NumPy, while a checkpoint is read, and
dequantised inside the layer that uses them. Rounding is to the nearest,
`|w - dequantize(quantize(w))| <= |scale| / 2`, unless the weights are
calibrated on examples, see `rounding`.
"""

import dataclasses
import math

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_paligemma.quantization.rounding import RANGES
from keras_paligemma.quantization.rounding import round_to

MODES = (None, "int8", "int4")
GROUP = 128
# Where a product sums over fewer values than this, fewer errors cancel out, so
# groups are smaller. Published models have no such layers.
SMALL, SMALL_GROUP = 1024, 8
# Rows of a table that are quantised at a time.
ROWS = 4096
# Rows of a TPU's memory tile, to which scales are padded.
TILE = 8


def table_mode(mode, width):
    """Return how a model of "int4" stores its embedding table.

    Errors in a narrow table cost more than those in all kernels: the nano
    preset's masks have 0.80 of float32's score in int4 (groups of 32), and 0.96
    with the table in int8. Published models have wide tables, which are int4.

    Args:
        mode: "int8", "int4" or `None`, the model's.
        width: int, values per row.
    """
    return "int8" if mode == "int4" and width < SMALL else mode


@dataclasses.dataclass(frozen=True)
class QuantizedFormat:
    """How a float array is stored as integers and scales.

    "int8" has one scale per output. "int4" packs two values into a byte and has
    one scale, positive or negative, for each 128 values along the last summed
    axis, or for each 8 if a product sums over fewer than 1,024. A shorter axis
    is one group, and the last group is padded with zeros. Both values of a byte
    belong to the same group, so that an axis can be sharded between groups.

    Scales are rounded up to bfloat16 before the integers are chosen: this only
    makes steps up to 0.8 % wider, and the product of an integer and its scale
    is exact in float32.

    Args:
        mode: "int8" or "int4".
        shape: tuple of ints, of the float array.
        axes: tuple of ints, the axes that a product sums over.

    Example:
        >>> layout = QuantizedFormat("int4", (1200, 8), (0,))
        >>> layout.stored_shape, layout.scale_shape
        ((640, 8), (16, 8))
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
        """Number of values that share a scale of "int4", even."""
        size = self.shape[self.axes[-1]]
        summed = math.prod(self.shape[axis] for axis in self.axes)
        group = GROUP if summed >= SMALL else SMALL_GROUP
        return min(group, size + size % 2)

    @property
    def groups(self):
        return -(-self.shape[self.axes[-1]] // self.group)

    @property
    def scales(self):
        """Number of scales along the axis of groups.

        Padded to a multiple of 8 if output axes follow; otherwise the TPU
        converts the stack of all layers to another layout in each step.
        """
        if self.axes[-1] == -1 or self.groups < TILE:
            return self.groups
        return -(-self.groups // TILE) * TILE

    @property
    def stored_shape(self):
        if self.mode == "int8":
            return self.shape
        return self._with(self.groups * self.group // 2)

    @property
    def scale_shape(self):
        if self.mode == "int4":
            return self._with(self.scales)
        shape = list(self.shape)
        for axis in self.axes:
            shape[axis] = 1
        return tuple(shape)

    def _with(self, size):
        """Return the shape with another size along the axis of groups."""
        shape = list(self.shape)
        shape[self.axes[-1]] = size
        return tuple(shape)

    @property
    def outputs_first(self):
        """This format with the output axes before the summed axes."""
        kept = [
            axis for axis in range(-len(self.shape), 0) if axis not in self.axes
        ]
        shape = tuple(self.shape[axis] for axis in (*kept, *self.axes))
        return QuantizedFormat(
            self.mode, shape, tuple(range(-len(self.axes), 0))
        )

    def quantize(self, array, scale=None):
        """Quantise a float array to integers and scales, on the host.

        Args:
            array: NumPy array of `shape`, of any float dtype.
            scale: bfloat16 array, one per group ("int4", of either sign) or
                output ("int8"); computed from the values if `None`.

        Returns:
            int8 array of `stored_shape`, bfloat16 array of `scale_shape`.

        Raises:
            ValueError: another shape, or NaN or infinity in the array.
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
                found = round_to(rows, self.axes, RANGES["int8"], given)
            else:
                found = self._round_groups(rows, given)
            stored[part], scales[part] = found
        return stored, scales

    def _round_groups(self, array, scale):
        axis = self.axes[-1]
        array = _filled(array, axis, self.groups * self.group)
        lead, tail = _split(array.shape, axis)
        array = array.reshape(*lead, self.groups, self.group, *tail)
        scale = None if scale is None else np.expand_dims(scale, axis)
        values, scale = round_to(array, (axis,), RANGES["int4"], scale)
        low, high = np.split(values.view("uint8"), 2, axis)
        packed = ((low & 15) | (high << 4)).view("int8")
        scale = _filled(scale.squeeze(axis), axis, self.scales)
        return packed.reshape(*lead, -1, *tail), scale

    def dequantize(self, stored, scale, dtype):
        """Return the floats of integers and scales, in `keras.ops`.

        Args:
            stored: int8 tensor of `stored_shape`; it may have more leading
                axes, and other sizes of axes that are not summed over.
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
        behind = [slice(None)] * len(tail)
        scale = scale[(..., slice(0, self.groups), *behind)]
        stored = ops.reshape(
            stored, (*lead, self.groups, self.group // 2, *tail)
        )
        fifteen, eight = (ops.cast(value, "int8") for value in (15, 8))
        low = ops.bitwise_xor(ops.bitwise_and(stored, fifteen), eight) - eight
        high = ops.right_shift(stored, ops.cast(4, "int8"))
        values = ops.concatenate([low, high], axis=axis)
        values = ops.cast(values, dtype) * ops.expand_dims(scale, axis)
        values = ops.reshape(values, (*lead, self.groups * self.group, *tail))
        size = self.shape[axis]
        return values[(..., slice(0, size), *behind)]


def _filled(array, axis, size):
    """Pad an axis with zeros to `size`."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - array.shape[axis])
    return np.pad(array, padding) if size > array.shape[axis] else array


def _split(shape, axis):
    """Return the shape before and after an axis counted from the end."""
    return tuple(shape[:axis]), tuple(shape[len(shape) + axis + 1 :])


def add_quantized_weight(layer, layout, initializer, name, outputs_first=0):
    """Add the variables `NAME` and `NAME_scale` of a frozen weight to a layer.

    Args:
        layer: Keras layer that is being built.
        layout: `QuantizedFormat`.
        initializer: Keras initializer of the float array. It must return the
            same values in each call, as Keras initializers do unless they have
            a generator as seed.
        name: str.
        outputs_first: int, number of output axes that the variables have
            before the others; see `layers.cpu_products`.

    Returns:
        Two variables, int8 and bfloat16.
    """
    initializer = keras.initializers.get(initializer)
    made = layout.outputs_first if outputs_first else layout

    def part(which):
        def initialize(shape, dtype=None):
            values = ops.convert_to_numpy(initializer(made.shape, "float32"))
            part = made.quantize(values)[which].astype("float32")
            return ops.cast(ops.convert_to_tensor(part), dtype)

        return initialize

    parts = (
        (name, made.stored_shape, "int8"),
        (f"{name}_scale", made.scale_shape, "bfloat16"),
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
    for variable in (stored, scale):
        variable.quantized_format = layout
        variable.outputs_first = outputs_first
    return stored, scale
