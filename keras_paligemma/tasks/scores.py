"""How sure a model is of an object, and which objects say the same.

A score is a function of the log-probabilities that the model gave to the four
locations and to the label of an object when it said them. Mask codes do not
count. Three definitions were compared by COCO's average precision, 0.50 to
0.95, of the nano preset's greedy answers: 800 scenes in trained and held-out
styles alike, 2,331 prompts for classes that are there and one that is not.

| | average precision | of classes that are there |
|---|---|---|
| `box_and_label` | 0.118 | 0.178 |
| `mean_probability` | 0.113 | 0.176 |
| `joint_probability` | 0.113 | 0.176 |
| the same score for all | 0.070 | 0.106 |

All labels of the nano preset are one token, so that the last two rank alike.
"""

from collections.abc import Iterable

import numpy as np

from keras_paligemma.tasks.objects import Object


def joint_probability(locations: np.ndarray, label: np.ndarray) -> float:
    """The probability of the whole object: the product of all tokens'.

    It is small for long labels, and where an edge is between two locations.

    Args:
        locations: float array (4,), log-probabilities.
        label: float array (tokens,), log-probabilities; may be empty.

    Returns:
        float, 0 to 1.

    Example:

    >>> round(joint_probability(np.log([0.5, 1, 1, 1]), np.log([0.5])), 3)
    0.25
    """
    return float(np.exp(np.sum(locations) + np.sum(label)))


def mean_probability(locations: np.ndarray, label: np.ndarray) -> float:
    """The geometric mean of all tokens' probabilities.

    Labels of any length compare, but a long one outweighs the box.

    Args and Returns are those of `joint_probability`.

    Example:

    >>> round(mean_probability(np.log([0.5, 1, 1, 1]), np.log([0.5])), 3)
    0.758
    """
    return float(np.exp(np.mean([*locations, *label])))


def box_and_label(locations: np.ndarray, label: np.ndarray) -> float:
    """The geometric mean of the box, times that of the label.

    Args and Returns are those of `joint_probability`.

    Example:

    >>> round(box_and_label(np.log([0.5, 1, 1, 1]), np.log([0.5])), 3)
    0.42
    """
    kind = np.mean(label) if len(label) else 0.0
    return float(np.exp(np.mean(locations) + kind))


def box_overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Measure the intersection over union of all pairs of boxes.

    Args:
        first: float array (boxes, 4) of (y1, x1, y2, x2), or of (x1, y1, x2,
            y2); of any unit.
        second: float array (others, 4), likewise.

    Returns:
        float64 array (boxes, others), 0 to 1; 0 of two boxes without area.

    Example:

    >>> box_overlaps([[0, 0, 2, 2]], [[0, 1, 2, 3], [5, 5, 6, 6]]).round(2)
    array([[0.33, 0.  ]])
    """
    first = np.asarray(first, "float64").reshape(-1, 1, 4)
    second = np.asarray(second, "float64").reshape(1, -1, 4)
    starts = np.maximum(first[..., :2], second[..., :2])
    ends = np.minimum(first[..., 2:], second[..., 2:])
    common = np.clip(ends - starts, 0, None).prod(-1)
    areas = [(one[..., 2:] - one[..., :2]).prod(-1) for one in (first, second)]
    union = areas[0] + areas[1] - common
    return np.divide(common, union, where=union > 0, out=np.zeros_like(union))


def suppress(
    objects: Iterable[Object], overlap: float = 0.5, by_label: bool = True
) -> list[Object]:
    """Keep the surest of objects that cover each other.

    Merges the answers of several samples or beams: chain them first.

    Args:
        objects: with scores.
        overlap: float, intersections over union above it are one object.
        by_label: bool, whether objects of different labels are left alone.

    Returns:
        List of objects, by falling score; equal scores stay in order.

    Raises:
        ValueError: an object has no score.

    Example:

    >>> box = (0, 0, 1, 1)
    >>> both = [Object(box, "cat", 0.2), Object(box, "cat", 0.9)]
    >>> [one.score for one in suppress(both)]
    [0.9]
    """
    objects = sorted(objects, key=_falling)
    boxes = np.array([one.box for one in objects]).reshape(-1, 4)
    kept = []
    for i, one in enumerate(objects):
        rivals = [
            k for k in kept if not by_label or objects[k].label == one.label
        ]
        if not (box_overlaps(boxes[[i]], boxes[rivals]) > overlap).any():
            kept.append(i)
    return [objects[i] for i in kept]


def _falling(one):
    """Return the key that sorts objects from the surest on."""
    if one.score is None:
        raise ValueError(
            "Objects are suppressed by their scores. Expected: a number. "
            f"Received: {one}."
        )
    return -one.score
