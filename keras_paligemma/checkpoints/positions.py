"""Resampling of position tables to another resolution."""

import math

import numpy as np


def resample(table_ID, num_tokens):
    """Resample a square table of positions; its corners keep their values.

    Args:
        table_ID: array (..., I, D), a row for each patch of a square picture.
        num_tokens: int, number of rows of the new table, a square number.

    Returns:
        Array (..., num_tokens, D) of the same dtype.

    Raises:
        ValueError: a number of rows that is not a square number.

    Source: big_vision, `models/vit.py`, `resample_posemb`: linear
        `scipy.ndimage.zoom`.
    """
    old, new = math.isqrt(table_ID.shape[-2]), math.isqrt(num_tokens)
    if old * old != table_ID.shape[-2] or new * new != num_tokens:
        raise ValueError(
            "Positions are those of square pictures. Received: "
            f"{table_ID.shape[-2]} rows to make {num_tokens} of."
        )
    *lead, _, width = table_ID.shape
    grid = table_ID.reshape(*lead, old, old, width).astype("float64")
    line = _line(old, new)
    grid = np.einsum("ai,bj,...ijd->...abd", line, line, grid)
    return grid.reshape(*lead, num_tokens, width).astype(table_ID.dtype)


def _line(old, new):
    """Return the weights of the old points for each new point of an axis."""
    at = np.linspace(0, old - 1, new)
    below = np.minimum(at.astype(int), old - 1)
    above = np.minimum(below + 1, old - 1)
    share = at - below
    weights = np.zeros((new, old))
    weights[np.arange(new), below] += 1 - share
    weights[np.arange(new), above] += share
    return weights


class Resampled:
    """The tensors of a checkpoint, with its position table resampled.

    Args:
        tensors: see `engine`.
        key: str, key of the position table.
        num_tokens: int, number of rows of the new table.
    """

    def __init__(self, tensors, key, num_tokens):
        self._tensors, self._key = tensors, key
        self._num_tokens = num_tokens
        self.dtypes = tensors.dtypes
        self.shapes = dict(tensors.shapes)
        if key in self.shapes:
            *lead, _, width = self.shapes[key]
            self.shapes[key] = (*lead, num_tokens, width)

    def read(self, key):
        array = self._tensors.read(key)
        if key == self._key:
            return resample(array, self._num_tokens)
        return array
