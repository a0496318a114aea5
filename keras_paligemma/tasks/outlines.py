"""The outlines of a mask, along the edges of its pixels."""

import numpy as np

# The four sides of a pixel, each from corner to corner with the pixel to the
# right of the way: (from, to) as offsets (y, x) of its upper left corner, and
# the neighbour (y, x) beyond.
_SIDES = (
    ((0, 0), (0, 1), (-1, 0)),
    ((0, 1), (1, 1), (0, 1)),
    ((1, 1), (1, 0), (1, 0)),
    ((1, 0), (0, 0), (0, -1)),
)


def loops_of(mask: np.ndarray) -> list[np.ndarray]:
    """Walk around all parts of a mask, the object to the right of the way.

    Pixels that touch at a corner alone are of different parts.

    Args:
        mask: bool array (height, width).

    Returns:
        List of int arrays (corners, 2) of (y, x), in pixels: clockwise around
        parts, the other way around holes.

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
            # Where two ways cross, turn right: stay at the same pixel.
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
    """Whether a way does, y pointing down."""
    down, right = corner[0] - before[0], corner[1] - before[1]
    return right * (after[0] - corner[0]) > down * (after[1] - corner[1])


def area_of(loop: np.ndarray) -> float:
    """Measure what a loop goes around: negative for a hole.

    Args:
        loop: int array (corners, 2) of (y, x).

    Returns:
        float, pixels.

    Example:

    >>> float(area_of(np.array([[0, 0], [0, 2], [1, 2], [1, 0]])))
    2.0
    """
    y, x = loop.T
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
