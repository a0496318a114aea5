"""Rounding floats to int8 and int4: to the nearest, or for example inputs.

On the host, in NumPy, since a checkpoint's arrays are rounded as they are read.
"""

from typing import Any

import ml_dtypes
import numpy as np

# The largest 4-bit integer whose negative also has 4 bits.
LARGEST = 7
# Fractions of a peak's scale that are tried.
SHARES = np.linspace(1, 0.6, 9, dtype="float32")
# Inputs and outputs that `round_for` processes at a time.
ROWS, COLUMNS = 128, 2048


def round_to(array, axes, largest, scale=None):
    """Round to the nearest integers of a symmetric range.

    Args:
        array: float32 NumPy array.
        axes: tuple of ints, the axes that share a scale.
        largest: int, the largest integer.
        scale: bfloat16 array, `axes` of size 1; computed from the largest
            absolute values if `None`.

    Returns:
        int8 array like `array`, and the scale.

    Raises:
        ValueError: the array has NaN or infinity.
    """
    if scale is None:
        scale = _scale_of(array, axes, largest)
    values = array / scale.astype("float32")
    np.clip(np.rint(values, out=values), -largest, largest, out=values)
    return values.astype("int8"), scale


def _scale_of(array, axes, largest):
    """Return bfloat16 scales that map the peaks to the largest integer."""
    peak = np.maximum(
        array.max(axes, keepdims=True), -array.min(axes, keepdims=True)
    )
    if not np.isfinite(peak).all():
        raise ValueError(
            "A weight that is NaN or infinite has no scale. Expected: finite "
            "weights. Is the checkpoint damaged?"
        )
    return _bfloat16_above(peak / np.float32(largest))


def _bfloat16_above(scale):
    """Round positive float32 up to bfloat16, its upper 16 bits; never to 0."""
    scale = np.maximum(scale, np.float32(1e-30))
    bits = (scale.view("uint32") + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return bits.view("float32").astype(ml_dtypes.bfloat16)


def order_and_factor(moment, damping=0.01):
    """Factor a second moment of a product's inputs, for `round_for`.

    Args:
        moment: NumPy array (inputs, inputs), the sum of x·xᵀ over examples.
        damping: float, fraction of the mean of the diagonal that is added to
            it, so that inputs absent from the examples still count.

    Returns:
        int array (inputs,), the order in which inputs are rounded, by falling
        second moment; float32 array R (inputs, inputs), upper triangular, so
        that the damped moment in that order is R·Rᵀ.
    """
    moment = moment.astype("float64")
    diagonal = np.einsum("ii->i", moment)
    order = np.argsort(-diagonal, kind="stable")
    # If all inputs are always zero, any rounding is right.
    diagonal += damping * (diagonal.mean() or 1.0)
    last_first = order[::-1]
    turned = np.linalg.cholesky(moment[np.ix_(last_first, last_first)])
    return order, turned[::-1, ::-1].astype("float32")


def round_for(layout, array, order, factor):
    """Round a weight to minimise the change of its product with examples.

    Inputs are rounded one by one, and those not rounded yet compensate for the
    error so far. The error of a single value may exceed half a step. A group's
    scale is the fraction in `SHARES` of its peak's scale that rounds its
    values best; values beyond the largest integer are clipped.

    Args:
        layout: `QuantizedFormat` of "int4".
        array: NumPy array of its shape, of any float dtype.
        order, factor: results of `order_and_factor`, with inputs in the order
            of the summed axes.

    Returns:
        As `QuantizedFormat.quantize`.

    Source: GPTQ, https://arxiv.org/abs/2210.17323, as Babai's nearest plane
        algorithm, https://arxiv.org/abs/2507.18553, which factors the moment
        itself instead of its inverse.
    """
    summed = tuple(range(len(layout.axes)))
    array = np.moveaxis(array, layout.axes, summed)
    *lead, size = array.shape[: len(summed)]
    kernel = array.reshape(len(order), -1)
    outer, inner = np.divmod(np.arange(len(order)), size)
    group = outer * layout.groups + inner // layout.group
    rounded = np.empty(kernel.shape, "float32")
    scale = np.empty((group[-1] + 1, kernel.shape[1]), ml_dtypes.bfloat16)
    for start in range(0, kernel.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        columns = kernel[:, part].astype("float32")
        scale[:, part] = _best_scale(columns, group)
        rounded[order, part] = _push_errors(
            columns[order], scale[group[order], part], factor
        )
    rounded = rounded.reshape(array.shape)
    scale = scale.reshape(*lead, layout.groups, *array.shape[len(summed) :])
    return layout.quantize(
        np.moveaxis(rounded, summed, layout.axes),
        np.moveaxis(scale, summed, layout.axes),
    )


def _best_scale(kernel: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the best scale for each group of rows, in each column."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    peak = np.maximum.reduceat(np.abs(kernel), first) / np.float32(LARGEST)
    best: Any = None
    least: Any = None
    for share in SHARES:
        scale = _bfloat16_above(share * peak)
        values, steps = round_to(kernel, (), LARGEST, scale[group])
        error = np.square(kernel - values * steps.astype("float32"))
        error = np.add.reduceat(error, first)
        if best is None:
            best, least = scale, error
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _push_errors(kernel, scales, factor):
    """Round the rows of a kernel in turn.

    With errors e so far, the best float for row j is
    row j + (Σ_{k<j} R_kj · e_k) / R_jj, which is then rounded.
    """
    rounded, errors = np.empty_like(kernel), np.empty_like(kernel)
    for start in range(0, len(kernel), ROWS):
        rows = range(start, min(start + ROWS, len(kernel)))
        # The terms of all previous chunks, in one product.
        before = factor[:start, start : rows.stop].T @ errors[:start]
        for row in rows:
            here = slice(start, row)
            moved = before[row - start] + factor[here, row] @ errors[here]
            wanted = kernel[row] + moved / factor[row, row]
            values, _ = round_to(wanted, (), LARGEST, scales[row])
            rounded[row] = values * scales[row].astype("float32")
            errors[row] = kernel[row] - rounded[row]
    return rounded
