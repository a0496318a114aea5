import doctest
import itertools
import math

import numpy as np
import pytest

from keras_paligemma.tasks import scores
from keras_paligemma.tasks.objects import Object
from keras_paligemma.tasks.scores import box_overlaps
from keras_paligemma.tasks.scores import suppress

RULES = (
    scores.joint_probability,
    scores.mean_probability,
    scores.box_and_label,
)


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(scores)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_probabilities_that_grow_with_each_token(rule):
    random = np.random.default_rng(0)
    assert rule(np.zeros(4), np.zeros(2)) == 1
    assert rule(np.zeros(4), np.zeros(0)) == 1
    assert rule([-np.inf, 0, 0, 0], [0]) == 0
    for _ in range(20):
        box, label = -random.exponential(size=4), -random.exponential(size=3)
        before = rule(box, label)
        assert 0 < before < 1
        for values in (box, label):
            values[1] /= 2
            assert rule(box, label) > before
            before = rule(box, label)


def test_the_three_differ_where_they_say():
    box = np.log([0.5, 0.5, 0.5, 0.5])
    short, long = np.log([0.25]), np.log([0.25] * 4)
    for label, count in ((short, 1), (long, 4)):
        np.testing.assert_allclose(
            scores.joint_probability(box, label), 0.5**4 * 0.25**count
        )
    # A long label dominates one score and not the other.
    np.testing.assert_allclose(
        scores.mean_probability(box, long), (0.5**4 * 0.25**4) ** (1 / 8)
    )
    np.testing.assert_allclose(
        scores.box_and_label(box, long), scores.box_and_label(box, short)
    )
    np.testing.assert_allclose(scores.box_and_label(box, long), 0.5 * 0.25)


def test_neighbours_share_an_edge():
    """Each location token within reach counts once."""
    chosen, near, far = (math.log(p) for p in (0.3, 0.2, 0.1))
    others = [
        ("<loc0500>", chosen),
        ("<loc0490>", near),
        ("<loc0510>", near),
        ("<loc0511>", far),
        ("<loc500>", far),
        ("<seg005>", far),
        ("", far),
    ]
    tokens = ["<loc0500>", " cat", "<seg005>"]
    found = scores.with_neighbours(tokens, [chosen, -1, -2], [others] * 3)
    assert found[1:] == [-1, -2]
    assert math.exp(found[0]) == pytest.approx(0.7)
    (alone,) = scores.with_neighbours(tokens[:1], [chosen], [others], reach=0)
    assert alone == pytest.approx(chosen)
    # A sampled token need not be among the most probable ones.
    (sampled,) = scores.with_neighbours(["<loc0509>"], [far], [others])
    assert math.exp(sampled) == pytest.approx(0.1 + 0.3 + 0.2 + 0.1)
    sure = [("<loc0500>", 0.0), ("<loc0501>", -9.0)]
    assert scores.with_neighbours(tokens[:1], [0.0], [sure]) == [0.0]
    with pytest.raises(ValueError, match="shorter"):
        scores.with_neighbours(tokens, [chosen] * 3, [others])


def test_overlaps_by_counting_pixels():
    random = np.random.default_rng(0)
    corners = np.sort(random.integers(0, 12, (2, 9, 2, 2)), axis=2)
    first, second = corners.reshape(2, 9, 4)
    found = box_overlaps(first, second)

    def pixels(box):
        y1, x1, y2, x2 = box
        return set(itertools.product(range(y1, y2), range(x1, x2)))

    for i, j in itertools.product(range(9), range(9)):
        one, two = pixels(first[i]), pixels(second[j])
        wanted = len(one & two) / len(one | two) if one | two else 0
        np.testing.assert_allclose(found[i, j], wanted)


def test_suppression_keeps_the_surest():
    near, far = (0, 0, 0.5, 0.5), (0.6, 0.6, 1, 1)
    weak, strong = Object(near, "cat", 0.2), Object(near, "cat", 0.7)
    shifted = Object((0, 0.05, 0.5, 0.55), "cat", 0.5)
    other, dog = Object(far, "cat", 0.1), Object(near, "dog", 0.3)
    everything = [weak, strong, other, dog, shifted]
    assert suppress(everything) == [strong, dog, other]
    assert suppress(everything, by_label=False) == [strong, other]
    assert suppress(everything, overlap=0.9) == [strong, shifted, dog, other]
    assert suppress([]) == []
    # The overlap itself is kept, up to that of equal boxes.
    part = Object((0, 0, 0.25, 0.5), "cat", 0.6)
    assert suppress([strong, part], overlap=0.5) == [strong, part]
    assert suppress([strong, weak], overlap=1) == [strong, weak]
    with pytest.raises(ValueError, match="of 0 to 1. Received: 2"):
        suppress([], overlap=2)


def test_what_is_suppressed_does_not_suppress():
    """In this chain, the first covers the second, and the second the third."""
    chain = [
        Object((0, 0.1 * i, 1, 0.1 * i + 0.4), "cat", 0.9 - 0.1 * i)
        for i in range(3)
    ]
    assert suppress(chain, overlap=0.5) == [chain[0], chain[2]]


def test_suppression_needs_scores():
    with pytest.raises(ValueError, match="by their scores"):
        suppress([Object((0, 0, 1, 1), "cat")])
