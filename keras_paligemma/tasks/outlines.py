"""Trace the outlines of a mask along the edges of its pixels."""

import numpy as np

# The four sides of a pixel, directed so that the pixel is on the right: start
# and end as offsets (y, x) from its upper left corner, and the offset (y, x) of
# the neighbour on the other side.
_SIDES = (
    ((0, 0), (0, 1), (-1, 0)),
    ((0, 1), (1, 1), (0, 1)),
    ((1, 1), (1, 0), (1, 0)),
    ((1, 0), (0, 0), (0, -1)),
)


def loops_of(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines of all parts of a mask.

    Pixels that touch only at a corner belong to different parts.

    Args:
        mask: bool array (height, width).

    Returns:
        list of int arrays (corners, 2) of (y, x), in pixels: clockwise around
        parts, counterclockwise around holes.

    Example:

    >>> loops_of(np.array([[True, True]]))[0].tolist()
    [[0, 0], [0, 2], [1, 2], [1, 0]]
    """
    padded = np.pad(mask, 1)
    targets = {}
    for start, end, (y, x) in _SIDES:
        beyond = np.roll(padded, (-y, -x), (0, 1))
        corners = np.argwhere(padded & ~beyond) - 1
        for corner, target in zip(
            (corners + start).tolist(), (corners + end).tolist(), strict=True
        ):
            targets.setdefault(tuple(corner), []).append(tuple(target))
    sides = dict.fromkeys(
        (corner, target) for corner in targets for target in targets[corner]
    )
    loops = []
    while sides:
        side, loop = next(iter(sides)), []
        while side in sides:
            del sides[side]
            loop.append(side[0])
            # Where two outlines cross, turn right: follow the same pixel.
            side = (
                side[1],
                next(
                    target
                    for target in targets[side[1]]
                    if len(targets[side[1]]) == 1 or _turns_right(*side, target)
                ),
            )
        loop = np.array(loop)
        ways = np.roll(loop, -1, 0) - loop
        loops.append(loop[(ways != np.roll(ways, 1, 0)).any(1)])
    return loops


def _turns_right(before, corner, after):
    """Return whether a path turns right at a corner; y points down."""
    down, right = corner[0] - before[0], corner[1] - before[1]
    return right * (after[0] - corner[0]) > down * (after[1] - corner[1])


def area_of(loop: np.ndarray) -> float:
    """Return the area inside a loop, negative for a hole.

    Args:
        loop: array (corners, 2) of (y, x), pixels.

    Returns:
        float, square pixels.

    Example:

    >>> float(area_of(np.array([[0, 0], [0, 2], [1, 2], [1, 0]])))
    2.0
    """
    y, x = loop.T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
