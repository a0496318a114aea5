"""Products with quantised weights, dequantised only within the product."""

import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers import cpu_products
from keras_paligemma.layers.remat import after
from keras_paligemma.layers.shard_spec import as_stored
from keras_paligemma.layers.shard_spec import gather
from keras_paligemma.layers.shard_spec import shard_spec_of
from keras_paligemma.quantization.storage import QuantizedFormat
from keras_paligemma.types import Tensor

# Bytes that are dequantised at a time, and the preferred divisors of a part's
# size: lanes, else rows, of a TPU's tiles.
PART = 2**24
ALIGNED = (128, 32, 16, 8, 1)
_STACKS = contextvars.ContextVar("stacks", default=({}, None))


@contextlib.contextmanager
def stacked_weights_scope(stacks, number):
    """Let the products of a block read one layer of scanned weights.

    Large weights are dequantised in parts, in a loop. A layer's slice as an
    input of that loop would be a copy; in a backward pass, all kernels of a
    layer would be copied at once. So each part is sliced out of the stack
    directly.

    Args:
        stacks: dict of the `id` of a block's variable to the variable of all
            layers and its tensor.
        number: int scalar tensor, index of the layer.
    """
    token = _STACKS.set((stacks, number))
    try:
        yield
    finally:
        _STACKS.reset(token)


def quantized_product(layout, stored, scale, x) -> Tensor:
    """Multiply by a frozen quantised weight.

    The backward pass dequantises the weight again: otherwise the float kernels
    of all layers would be saved for it at once.

    Args:
        layout: `QuantizedFormat`.
        stored: int8 variable or tensor, see `QuantizedFormat.dequantize`.
        scale: bfloat16 variable or tensor, likewise.
        x: tensor (..., *summed axes).

    Returns:
        Tensor (..., *other axes), of the dtype of `x`.
    """
    weight = _Weight.of(layout, stored, scale)
    if cpu_products.is_answering():
        # A SavedModel would store a graph of each gradient, and Torch makes a
        # class for each.
        return weight.holding(*weight.tensors()).product(x)

    @ops.custom_gradient
    def product(x, *tensors):
        values = weight.holding(*tensors)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            return values.gradient(upstream), *[None] * len(tensors)

        return values.product(x), gradient

    # Tensors, not variables: the gradient is computed after the trainer's or
    # the stack's `StatelessScope` has ended, where variables differ.
    return product(x, *weight.tensors())


def quantized_gradient(layout, stored, scale, gradient):
    """Return the gradient with respect to `x` of `quantized_product`.

    Args:
        layout: `QuantizedFormat`.
        stored: int8 variable or tensor, see `QuantizedFormat.dequantize`.
        scale: bfloat16 variable or tensor, likewise.
        gradient: tensor (..., *other axes), of the product's output.

    Returns:
        Tensor (..., *summed axes).
    """
    return _Weight.of(layout, stored, scale).gradient(gradient)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """The tensors of a weight, or of a stack with the index of a layer.

    `specs` has a `ShardSpec` or `None` for each of both tensors.
    """

    layout: QuantizedFormat
    stored: Any
    scale: Any
    number: Any = None
    specs: tuple = (None, None)

    @classmethod
    def of(cls, layout, stored, scale):
        if getattr(stored, "outputs_first", 0):
            layout = layout.outputs_first
        stacks, number = _STACKS.get()
        if id(stored) in stacks:
            stored, stored_tensor = stacks[id(stored)]
            scale, scale_tensor = stacks[id(scale)]
            if layout.mode == "int8":
                # Multiplied as integers, and gathered by the compiler.
                return cls(layout, stored_tensor, scale_tensor, number)
        else:
            stored_tensor, scale_tensor = _value(stored), _value(scale)
            number = None
        specs = shard_spec_of(stored), shard_spec_of(scale)
        return cls(layout, stored_tensor, scale_tensor, number, specs)

    def holding(self, stored, scale, number=None):
        return dataclasses.replace(
            self, stored=stored, scale=scale, number=number
        )

    def tensors(self):
        number = [] if self.number is None else [self.number]
        return [self.stored, self.scale, *number]

    def product(self, x):
        summed, kept = _axes(self.layout)
        inputs = [self.layout.shape[axis] for axis in summed]
        if (
            self.layout.mode == "int8"
            and kept == list(range(len(kept)))
            and cpu_products.should_use_integers(x, inputs)
        ):
            whole = self.part()
            return cpu_products.integer_product(
                whole.stored, whole.scale, x, inputs
            )
        count, runs = self._parts(), self._runs()
        if count == 1:
            return self.after(x).part()._multiply(x)
        axis = len(x.shape) - len(summed)
        if keras.backend.backend() != "jax":
            parts = [
                self.part(index, count).after(x)._multiply(x)
                for index in range(count)
            ]
            return ops.concatenate(parts, axis=axis)
        # Written in place: a concatenation would copy the parts.
        sizes = self.stored.shape[-len(self.layout.shape) :]
        shape = [*ops.shape(x)[:axis], *(sizes[number] for number in kept)]

        def write(y, index):
            part = self.part(index, count).after(x)._multiply(x)
            for run, piece in enumerate(ops.split(part, runs, axis)):
                starts = [0] * len(shape)
                starts[axis] = (run * count + index) * piece.shape[axis]
                y = ops.slice_update(y, starts, piece)
            return y, None

        return ops.scan(write, ops.zeros(shape, x.dtype), ops.arange(count))[0]

    def gradient(self, gradient):
        summed, kept = _axes(self.layout)
        count, runs = self._parts(), self._runs()
        if count == 1:
            return self.after(gradient).part()._back(gradient)
        axis = len(gradient.shape) - len(kept)

        def add(total, index):
            upstream = _part(gradient, axis, index, count, runs)
            part = self.part(index, count).after(upstream)
            return total + part._back(upstream), None

        summed_shape = [self.layout.shape[axis] for axis in summed]
        none = ops.zeros(
            (*ops.shape(gradient)[:axis], *summed_shape), gradient.dtype
        )
        return ops.scan(add, none, ops.arange(count))[0]

    def _multiply(self, x):
        summed, _ = _axes(self.layout)
        if self._scales_sums(x.dtype):
            # Outputs are scaled after the sum: a TPU then converts the
            # integers within the product.
            y = _contract(x, ops.cast(self.stored, x.dtype), summed)
            return y * self._of_outputs(x.dtype)
        return _contract(x, self._floats(x.dtype), summed)

    def _back(self, gradient):
        _, kept = _axes(self.layout)
        if self._scales_sums(gradient.dtype):
            gradient = gradient * self._of_outputs(gradient.dtype)
            kernel = ops.cast(self.stored, gradient.dtype)
        else:
            kernel = self._floats(gradient.dtype)
        return _contract(gradient, kernel, kept)

    def _scales_sums(self, dtype):
        """Return whether a product is one of integers, scaled afterwards.

        float16 could hold neither sums of products with integers up to 127 nor
        gradients that are as small as the scales.
        """
        is_half = keras.backend.standardize_dtype(dtype) == "float16"
        return self.layout.mode == "int8" and not is_half

    def _floats(self, dtype):
        return self.layout.dequantize(self.stored, self.scale, dtype)

    def _of_outputs(self, dtype):
        """Reshape the scales of "int8" to the axes of a product's output."""
        summed, _ = _axes(self.layout)
        return ops.cast(ops.squeeze(self.scale, summed), dtype)

    def after(self, x):
        """Dequantise only after `x` is computed; see `remat.after`."""
        if self.number is not None:
            return dataclasses.replace(self, number=after(x, self.number)[0])
        stored, scale = after(x, self.stored, self.scale)
        return dataclasses.replace(self, stored=stored, scale=scale)

    def part(self, index=0, count=1):
        """Return a part of one layer, replicated on all devices.

        Parts lie along the first axis that is not summed. If that axis is
        sharded, a part has one run of each device's shard, and only these runs
        are gathered.
        """
        axis, runs = _axes(self.layout)[1][0], self._runs()
        numbers = [] if self.number is None else [self.number]

        def cut(x, spec):
            shards = self._num_shards(spec)
            if shards not in (1, runs):
                # Scales that are sharded along another axis than integers.
                x = gather(_layer, x, spec, *numbers)
                return _part(x, axis, index, count, runs)
            return gather(
                # Along a sharded axis each device has one run.
                lambda x, index, *number: _part(
                    x, axis, index, count, runs // shards, *number
                ),
                x,
                spec,
                index,
                *numbers,
            )

        stored, scale = map(cut, (self.stored, self.scale), self.specs)
        return _Weight(self.layout, stored, scale)

    def _runs(self):
        """Return the number of runs that a part consists of."""
        return self._num_shards(self.specs[0])

    def _num_shards(self, spec):
        """Return the number of shards of the axis along which parts lie."""
        axis = _axes(self.layout)[1][0] - len(self.layout.shape)
        return 1 if spec is None else spec.num_shards(axis)

    def _parts(self):
        """Return the number of equal parts that are dequantised in turn.

        A larger kernel of 28b, or an embedding table, would take more memory
        as floats than the rest of a step.
        """
        is_sharded = self.specs[0] is not None
        if (
            self.layout.mode == "int8"
            and platform() == "tpu"
            and not is_sharded
        ):
            return 1
        shape = self.stored.shape[-len(self.layout.shape) :]
        size = shape[_axes(self.layout)[1][0]] // self._runs()
        least = -(-math.prod(shape) // PART)
        for aligned in ALIGNED:
            for count in range(least, min(8 * least, size)):
                if size % (count * aligned) == 0:
                    return count
        return 1


def _value(weight):
    """Return the tensor of a variable, or a tensor unchanged."""
    weight = weight.value if isinstance(weight, keras.Variable) else weight
    return ops.convert_to_tensor(weight)


def _layer(x, *number):
    """Return one layer if `x` is a stack, else `x`."""
    return _part(x, 0, 0, 1, 1, *number)


def _part(x, axis, index, count, runs=1, number=None):
    """Slice a part of an axis, of one layer if `x` is a stack.

    Args:
        x: tensor.
        axis: int, axis of a layer.
        index: int scalar, index of the part.
        count: int, number of parts.
        runs: int, number of runs of equal length in a part.
        number: int scalar, index of the layer in a stack.

    Returns:
        Tensor, `axis` divided by `count`.
    """
    if number is None and count == 1:
        return x
    if number is None and axis == 0 and runs == 1:
        # Whole tiles are indexed: a slice that begins at any row would make a
        # TPU copy the table into another layout.
        x = ops.reshape(x, (count, x.shape[0] // count, *x.shape[1:]))
        return ops.take(x, index, axis=0)
    starts, shape = [0] * len(x.shape), list(ops.shape(x))
    if number is not None:
        axis += 1
        starts[0], shape[0] = number, 1
    shape[axis] //= count * runs
    pieces = []
    for run in range(runs):
        starts[axis] = (run * count + index) * shape[axis]
        pieces.append(ops.slice(x, starts, shape))
    x = ops.concatenate(pieces, axis) if runs > 1 else pieces[0]
    return x if number is None else as_stored(ops.reshape(x, x.shape[1:]))


def _axes(layout):
    """Return the axes that a product sums over, and the other axes."""
    rank = len(layout.shape)
    summed = [rank + axis for axis in layout.axes]
    return summed, [axis for axis in range(rank) if axis not in summed]


def _contract(x, kernel, axes):
    """Sum over the last axes of `x` and the given axes of a kernel."""
    last = range(len(x.shape) - len(axes), len(x.shape))
    return ops.tensordot(x, kernel, axes=[list(last), axes])
