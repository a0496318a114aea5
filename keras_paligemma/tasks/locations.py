"""Convert boxes to the numbers of `<loc>` tokens and back, vectorised."""

import numpy as np
from numpy.typing import ArrayLike

# There are 1024 tokens. The published models were trained on round(x · 1023):
# each token is the centre of its bin, and the first and last bins are half as
# wide. Many readers divide by 1024 instead, which moves each edge up and left
# by at most a thousandth of the picture.
LAST = 1023


def to_locations(boxes: ArrayLike, scale: int = LAST) -> np.ndarray:
    """Round edges to the numbers of location tokens.

    Args:
        boxes: float array (…, 4) of y1, x1, y2, x2 as fractions of the
            picture, 0 to 1; or any array of such coordinates.
        scale: 1023 as the models were trained, or 1024 for models that were
            fine-tuned on round(x · 1024).

    Returns:
        int array (…, 4), 0 to 1023. Halves are rounded to even, as in the
        original.

    Raises:
        ValueError: if a coordinate is outside 0 to 1, or the scale is invalid.

    Example:

    >>> to_locations([0, 0.25, 0.5, 1]).tolist()
    [0, 256, 512, 1023]

    Source: big_vision `pp/proj/paligemma/segmentation.py`.
    """
    boxes = np.asarray(boxes, "float64")
    if not np.all((boxes >= 0) & (boxes <= 1)):
        raise ValueError(
            "Locations are shares of the picture. Expected: 0 to 1. Received: "
            f"{boxes.min()} to {boxes.max()}. Divide pixels by the picture's "
            "height and width."
        )
    bins = np.rint(boxes * _scale(scale)).astype("int64")
    return np.minimum(bins, LAST)


def from_locations(locations: ArrayLike, scale: int = LAST) -> np.ndarray:
    """Convert the numbers of tokens to edges.

    Args:
        locations: int array (…, 4), 0 to 1023.
        scale: divisor; see `to_locations`.

    Returns:
        float64 array (…, 4), fractions of the picture. `to_locations` restores
        the same tokens; an edge is restored within half a bin, 1 / 2046, or
        within one bin at the end of a scale of 1024.

    Raises:
        ValueError: if a number belongs to no token, or the scale is invalid.

    Example:

    >>> from_locations([0, 512, 1023]).round(4).tolist()
    [0.0, 0.5005, 1.0]
    >>> from_locations([0, 512, 1023], scale=1024).round(4).tolist()
    [0.0, 0.5, 0.999]
    """
    locations = np.asarray(locations)
    if not locations.size:
        return np.zeros(locations.shape)
    whole = np.issubdtype(locations.dtype, np.integer)
    if not whole or not np.all((locations >= 0) & (locations <= LAST)):
        raise ValueError(
            f"Locations are whole numbers, 0 to {LAST}. Received: "
            f"{locations.dtype}, {locations.min()} to {locations.max()}."
        )
    return locations / _scale(scale)


def _scale(scale):
    if scale not in (LAST, LAST + 1):
        raise ValueError(
            f"Locations are scaled by {LAST} or {LAST + 1}. Received: "
            f"{scale!r}."
        )
    return scale
