"""Matrix products on CPUs: outputs-first kernels as the left operand.

Decoding multiplies large kernels with one row per answer. The rate at which
XLA:CPU reads a kernel depends on the order of the operands. Milliseconds for
kernels of 85 M values, two cores with AVX-512, rows from 1 to 32:

| | 1 | 2 | 8 | 32 |
| --- | --- | --- | --- | --- |
| float32, x · kernel (inputs, outputs) | 12 | 25 | 26 | 49 |
| float32, kernel (outputs, inputs) · xᵀ | 14 | 14 | 18 | 35 |
| bfloat16 to float32, kernel · xᵀ | 139 | 12 | 13 | 18 |
| int8 to int32, kernel · xᵀ | 122 | 6 | 8 | 22 |

So kernels are stored outputs first here, few rows are the right operand, a
single row of 16 or 8 bits is padded to two, and sums are float32 or int32.
Files keep their order: `layers.weight` translates.
"""

import contextlib
import contextvars
import functools
import math
from pathlib import Path

import keras
from keras import ops

from keras_paligemma.compat import compiles_here
from keras_paligemma.compat import platform

# With more rows both orders take the same time, and this order transposes.
FEW_ROWS = 32
_ANSWERING = contextvars.ContextVar("answering", default=False)


@contextlib.contextmanager
def answering_scope():
    """Use special products for few rows, and no gradients, in this context.

    Programs that generate answers run in it. Training does not: a loss in
    chunks of few tokens must round as the whole loss does.
    """
    token = _ANSWERING.set(True)
    try:
        yield
    finally:
        _ANSWERING.reset(token)


def is_answering():
    """Return whether the code here runs in `answering_scope`."""
    return _ANSWERING.get()


def should_use_cpu_products():
    """Return whether the code here computes the products of a model.

    Returns:
        bool: `True` on the JAX backend on a CPU, for programs that run on this
        machine, on one device.
    """
    return (
        platform() == "cpu"
        and compiles_here()
        and keras.distribution.distribution() is None
    )


def product(kernel, x, input_axes):
    """Multiply the last axes of `x` with a kernel that has outputs first.

    Args:
        kernel: tensor (*output axes, *input axes).
        x: tensor (..., *input axes).
        input_axes: tuple of ints, shape of the axes that are summed over.

    Returns:
        Tensor (..., *output axes), dtype of `x`; the sums are float32, or
        float64 if `x` is.
    """
    import jax.numpy as jnp

    kernel_OI, x_RI, shape = _matrices(kernel, x, input_axes)
    sums = jnp.promote_types(x.dtype, "float32")
    y_RO = _multiply(kernel_OI.astype(x.dtype), x_RI, sums)
    return y_RO.astype(x.dtype).reshape(shape)


def take_rows(table, ids):
    """Return the rows of a table by their ids, in programs that answer.

    XLA:CPU takes rows of bfloat16 from a float32 copy of the whole table, of
    2.4 GB in a 3b. The bits of the rows are therefore taken as integers, which
    has no gradient.

    Args:
        table: tensor (rows, width).
        ids: int tensor of any shape.

    Returns:
        Tensor (..., width), dtype of the table.
    """
    from jax import lax

    table = ops.convert_to_tensor(table)
    if table.dtype != "bfloat16" or not is_answering():
        return ops.take(table, ids, axis=0)
    bits = lax.bitcast_convert_type(table, "uint16")
    return lax.bitcast_convert_type(ops.take(bits, ids, axis=0), table.dtype)


def should_use_integers(x, input_axes):
    """Return whether `integer_product` is faster than dequantisation.

    It is for few rows, and with `has_integer_tiles` for any number of them.
    """
    if not (should_use_cpu_products() and is_answering()):
        return False
    rows = math.prod(x.shape[: len(x.shape) - len(input_axes)])
    return isinstance(rows, int) and (rows <= FEW_ROWS or has_integer_tiles())


@functools.cache
def has_integer_tiles():
    """Return whether the CPU multiplies tiles of 8-bit integers (AMX).

    XLA uses them without an option: with two cores, the prompts of an int8
    model take a third of the time of float products. Other CPUs, where this
    was not measured, multiply many rows as floats.
    """
    described = Path("/proc/cpuinfo")
    return described.exists() and "amx_int8" in described.read_text()


def integer_product(kernel, scale, x, input_axes):
    """Multiply integers with integers, and scale the sums.

    Each row is written as two digits of 8 bits, `x ≈ step · (254 · high +
    low)`: its values are rounded to 1 / 64,516 of the row's largest. This is
    two orders of magnitude finer than the rounding of the kernel.

    Args:
        kernel: int8 tensor (*output axes, *input axes).
        scale: tensor of one scale per output.
        x: tensor (..., *input axes).
        input_axes: tuple of ints.

    Returns:
        Tensor (..., *output axes), dtype of `x`.
    """
    import jax.numpy as jnp

    kernel_OI, x_RI, shape = _matrices(kernel, x, input_axes)
    x_RI = x_RI.astype("float32")
    largest_R1 = jnp.max(jnp.abs(x_RI), axis=1, keepdims=True)
    step_R1 = jnp.maximum(largest_R1, 1e-30) / (127 * 254)
    whole_RI = x_RI / step_R1
    high_RI = jnp.round(whole_RI / 254)
    low_RI = jnp.round(whole_RI - 254 * high_RI)
    digits = jnp.concatenate([high_RI, low_RI]).astype("int8")
    sums = _multiply(kernel_OI, digits, "int32").astype("float32")
    high_RO, low_RO = jnp.split(sums, 2)
    y_RO = (254 * high_RO + low_RO) * step_R1
    y_RO = y_RO * scale.astype("float32").reshape(1, -1)
    return y_RO.astype(x.dtype).reshape(shape)


def _matrices(kernel, x, input_axes):
    """Return kernel and `x` as matrices, and the shape of their product."""
    inputs = math.prod(input_axes)
    outputs = kernel.shape[: len(kernel.shape) - len(input_axes)]
    others = x.shape[: len(x.shape) - len(input_axes)]
    return (
        kernel.reshape(math.prod(outputs), inputs),
        x.reshape(math.prod(others), inputs),
        (*others, *outputs),
    )


def _multiply(kernel_OI, x_RI, dtype):
    """Return x · kernelᵀ with sums of a dtype."""
    import jax
    import jax.numpy as jnp

    def dot(a, b):
        axes = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)

    rows = x_RI.shape[0]
    if not _are_few(rows):
        return dot(x_RI, kernel_OI)
    if rows == 1 and x_RI.dtype.itemsize < 4:
        x_RI = jnp.pad(x_RI, ((0, 1), (0, 0)))
    # Without the barrier, XLA would move the transposition into the product
    # and so restore the slow order.
    y_OR = jax.lax.optimization_barrier(dot(kernel_OI, x_RI))
    return y_OR.T[:rows]


def _are_few(rows):
    """Return whether a number of rows is small; a symbolic one is not."""
    is_small = isinstance(rows, int) and rows <= FEW_ROWS
    return is_small and is_answering()
