"""Rounding floats to int8 and int4: to the nearest, or for example inputs.

On the host, in NumPy, since a checkpoint's arrays are rounded as they are read.
"""

from typing import Any

import ml_dtypes
import numpy as np

# The smallest and the largest integer of each format.
RANGES = {"int8": (-127, 127), "int4": (-8, 7)}
# Fractions of the plain scale that are tried.
SHARES = np.linspace(1, 0.6, 9, dtype="float32")
# Inputs and outputs that `round_for` processes at a time.
ROWS, COLUMNS = 128, 2048


def round_to(array, axes, integers, scale=None):
    """Round to the nearest integers of a range.

    Args:
        array: float32 NumPy array.
        axes: tuple of ints, the axes that share a scale.
        integers: pair of ints, one of `RANGES`.
        scale: bfloat16 array, `axes` of size 1; computed from the smallest and
            the largest values if `None`.

    Returns:
        int8 array like `array`, and the scale.

    Raises:
        ValueError: the array has NaN or infinity.
    """
    if scale is None:
        low = array.min(axes, keepdims=True)
        high = array.max(axes, keepdims=True)
        if not (np.isfinite(low) & np.isfinite(high)).all():
            raise ValueError(
                "A weight that is NaN or infinite has no scale. Expected: "
                "finite weights. Is the checkpoint damaged?"
            )
        scale = _scale_of(low, high, integers)
    values = array / scale.astype("float32")
    np.clip(np.rint(values, out=values), *integers, out=values)
    return values.astype("int8"), scale


def _scale_of(low, high, integers, share=1.0):
    """Return the smallest bfloat16 scales that round to the nearest.

    The value farthest from zero becomes the smallest integer. In a range with
    more integers below zero than above, its scale is negative if the value is
    positive.

    Args:
        low, high: float32 arrays, the smallest and the largest values.
        integers: pair of ints, one of `RANGES`.
        share: float, factor of the scales; below 1, the farthest values are
            clipped.
    """
    smallest, largest = integers
    peak, other = np.maximum(high, -low), np.minimum(high, -low)
    # Half a step beyond the largest integer is still rounded to the nearest.
    scale = np.maximum(
        peak / np.float32(-smallest), other / np.float32(largest + 0.5)
    )
    scale = _bfloat16_above(np.float32(share) * scale)
    flipped = (high > -low) & (-smallest > largest)
    return np.where(flipped, -scale, scale)


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
    scale is the fraction in `SHARES` of the plain scale that rounds its values
    best, with squared errors weighted by the second moments of their inputs;
    values beyond the range are clipped.

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
    # The diagonal of R·Rᵀ.
    moment = np.empty(len(order), "float32")
    moment[order] = np.square(factor).sum(1)
    rounded = np.empty(kernel.shape, "float32")
    scale = np.empty((group[-1] + 1, kernel.shape[1]), ml_dtypes.bfloat16)
    for start in range(0, kernel.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        columns = kernel[:, part].astype("float32")
        scale[:, part] = _best_scale(columns, group, moment)
        rounded[order, part] = _push_errors(
            columns[order], scale[group[order], part], factor
        )
    rounded = rounded.reshape(array.shape)
    scale = scale.reshape(*lead, layout.groups, *array.shape[len(summed) :])
    return layout.quantize(
        np.moveaxis(rounded, summed, layout.axes),
        np.moveaxis(scale, summed, layout.axes),
    )


def _best_scale(kernel: np.ndarray, group, moment) -> np.ndarray:
    """Return the best scale for each group of rows, in each column.

    Args:
        kernel: array (inputs, outputs).
        group: int array (inputs,), number of the group.
        moment: array (inputs,), by which squared errors are weighted.
    """
    first = np.flatnonzero(np.diff(group, prepend=-1))
    low = np.minimum.reduceat(kernel, first)
    high = np.maximum.reduceat(kernel, first)
    best: Any = None
    least: Any = None
    for share in SHARES:
        scale = _scale_of(low, high, RANGES["int4"], share)
        values, steps = round_to(kernel, (), RANGES["int4"], scale[group])
        error = np.square(kernel - values * steps.astype("float32"))
        error *= moment[:, None]
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
            values, _ = round_to(wanted, (), RANGES["int4"], scales[row])
            rounded[row] = values * scales[row].astype("float32")
            errors[row] = kernel[row] - rounded[row]
    return rounded
