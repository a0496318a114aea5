"""The one matrix-multiply layer of the package."""

import math
from collections.abc import Callable

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers import cpu_products
from keras_paligemma.layers.dropout import drop
from keras_paligemma.layers.weight import Weight
from keras_paligemma.quantization.products import quantized_product
from keras_paligemma.quantization.storage import QuantizedFormat
from keras_paligemma.quantization.storage import add_quantized_weight
from keras_paligemma.types import Tensor


class Projection(keras.layers.Layer):
    """Multiply the last axes of a tensor with a kernel, and its adapter.

    Every learned product of both towers is a `Projection`, so adapters and
    storage formats are written once. An adapter is low-rank in compute too:
    `x·A·B` is added, without a merged kernel and without a gradient of the
    frozen kernel. It may add a bias, and it may scale each output (the gain
    of DoRA). All of these are multiplied by one scale: 0 turns the adapter
    and its gradients off.

    Args:
        input_axes: tuple of ints, shape of the axes that are summed over.
        output_axes: tuple of ints, shape of the axes that replace them.
        use_bias: bool.
        kernel_initializer: Keras initializer, or `None` for a normal one with
            variance 1 / (number of inputs).
        quantization: "int8", "int4" or `None`: how the kernel is stored. A
            quantised kernel is frozen, and dequantised in each product.

    Call arguments:
        x: tensor (..., *input_axes).

    Returns:
        Tensor (..., *output_axes).

    Example:
        >>> heads = Projection((8,), (2, 4))
        >>> tuple(heads(ops.ones((1, 3, 8))).shape)
        (1, 3, 2, 4)

    Source: the adapter is LoRA, https://arxiv.org/abs/2106.09685, in the
        parametrisation of PEFT: one A a projection; the gain follows from
        DoRA, https://arxiv.org/abs/2402.09353.
    """

    def __init__(
        self,
        input_axes,
        output_axes,
        use_bias=False,
        kernel_initializer=None,
        quantization=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_axes = tuple(input_axes)
        self.output_axes = tuple(output_axes)
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer or normal(
            math.prod(self.input_axes)
        )
        self.quantized_format = None
        if quantization is not None:
            self.quantized_format = QuantizedFormat(
                quantization,
                self.input_axes + self.output_axes,
                tuple(range(len(self.input_axes))),
            )
        self.adapter_scale = None
        self.adapter_bias = None
        self.adapter_gain = None
        # Called with each input, for calibration.
        self.observer: Callable[[Tensor], None] | None = None

    def build(self, input_shape=None):
        layout = self.quantized_format
        # Number of output axes that precede the input axes; 0 for none.
        outputs_first = 0
        if cpu_products.should_use_cpu_products() and (
            layout is None or layout.mode == "int8"
        ):
            outputs_first = len(self.output_axes)
        if layout is not None:
            self.kernel, self.kernel_scale = add_quantized_weight(
                self, layout, self.kernel_initializer, "kernel", outputs_first
            )
        else:
            axes = self.input_axes, self.output_axes
            self.kernel = self.add_weight(
                shape=sum(axes[::-1] if outputs_first else axes, ()),
                initializer=self.kernel_initializer,
                name="kernel",
            )
            self.kernel.outputs_first = outputs_first
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                shape=self.output_axes, initializer="zeros", name="bias"
            )
        self.built = True

    def save_own_variables(self, store):
        for number, variable in enumerate(self._own_variables()):
            store[str(number)] = Weight((variable,)).read()

    def load_own_variables(self, store):
        variables = self._own_variables()
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"The file does not fit {self.path!r}. Expected: "
                f"{len(variables)} arrays. Received: {len(store.keys())}."
            )
        for number, variable in enumerate(variables):
            Weight((variable,)).assign(store[str(number)])

    def _own_variables(self):
        """Return the variables in Keras's order."""
        return self._trainable_variables + self._non_trainable_variables

    def add_adapter(self, rank, scale, dropout=0.0, bias=False, gain=False):
        """Add the product of two low-rank matrices, initially zero.

        Args:
            rank: int, the width between the two.
            scale: float, multiplies the adapter. It is stored in a variable,
                so that switching adapters needs no recompilation.
            dropout: float, dropout rate of the adapter's inputs in training;
                needs a seed, see `layers.dropout`.
            bias: bool, add a bias to the product, initially zero.
            gain: bool, multiply kernel and product by 1 + gain, one gain per
                output, initially zero.
        """
        self._tracker.unlock()
        self._add_piece(
            "adapter_a",
            self.input_axes + (rank,),
            normal(math.prod(self.input_axes)),
        )
        self._add_piece("adapter_b", (rank,) + self.output_axes)
        if bias:
            self._add_piece("adapter_bias", self.output_axes)
        if gain:
            self._add_piece("adapter_gain", self.output_axes)
        self._add_piece(
            "adapter_scale",
            (),
            keras.initializers.Constant(scale),
            trainable=False,
        )
        self._tracker.lock()
        self.adapter_dropout = dropout

    def _add_piece(self, name, shape, initializer="zeros", trainable=True):
        # float32 whatever the kernel's dtype: bfloat16 would lose the small
        # updates of an adapter to rounding.
        weight = self.add_weight(
            shape=shape,
            initializer=initializer,
            dtype="float32",
            trainable=trainable,
            name=name,
        )
        setattr(self, name, weight)

    def call(self, x):
        if self.observer is not None:
            self.observer(x)
        y = self._product(x)
        if self.adapter_scale is not None:
            y = y + self._adapt(x)
        if self.adapter_gain is not None:
            # Not y · (1 + gain): bfloat16 would round 1 + gain to 1.
            y = y + y * self._scaled(self.adapter_gain, y.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y

    def _adapt(self, x):
        """Return the adapter's output, without forming a merged kernel."""
        x = drop(x, self.adapter_dropout, self.path)
        low = contract(x, self.adapter_a, self.input_axes)
        low = low * ops.cast(self.adapter_scale, low.dtype)
        y = contract(low, self.adapter_b, low.shape[-1:])
        if self.adapter_bias is not None:
            y = y + self._scaled(self.adapter_bias, y.dtype)
        return y

    def _scaled(self, piece, dtype):
        return ops.cast(self.adapter_scale * piece, dtype)

    def _product(self, x):
        if self.quantized_format is None:
            if self.kernel.outputs_first:
                kernel = ops.convert_to_tensor(self.kernel)
                return cpu_products.product(kernel, x, self.input_axes)
            return contract(x, self.kernel, self.input_axes)
        return quantized_product(
            self.quantized_format, self.kernel, self.kernel_scale, x
        )


def contract(x, kernel, input_axes):
    """Sum over the last axes of `x` and the first axes of `kernel`.

    On CPUs and GPUs it is a product of two matrices, forward and backward,
    without a copy of the kernel; the gradient of a product over the axes of
    heads would transpose the kernel. On TPUs the axes are kept, and the
    compiler chooses the layout by them.
    """
    kernel = ops.cast(kernel, x.dtype)
    summed = len(input_axes)
    rows, columns = kernel.shape[:summed], kernel.shape[summed:]
    others = tuple(x.shape)[: len(x.shape) - summed]
    if keras.backend.backend() == "tensorflow":
        # Its product of three axes and two transposes `x` if an axis has no
        # static size, and is 15 operations more in the graph.
        kept = (-1,)
    elif len(kernel.shape) == 2 or platform() == "tpu":
        return ops.tensordot(x, kernel, axes=summed)
    else:
        kept = others
    y = ops.matmul(
        ops.reshape(x, (*kept, math.prod(rows))),
        ops.reshape(kernel, (math.prod(rows), math.prod(columns))),
    )
    if sum(size is None for size in others) == 1:
        others = [-1 if size is None else size for size in others]
    elif any(size is None for size in others):
        others = ops.shape(x)[: len(others)]
    return ops.reshape(y, (*others, *columns))


def normal(fan_in):
    """Return a normal initializer with variance 1 / `fan_in`."""
    return keras.initializers.RandomNormal(stddev=fan_in**-0.5)
