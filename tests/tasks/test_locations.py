import doctest

import numpy as np
import pytest

from keras_paligemma.tasks import locations
from keras_paligemma.tasks.answers import write_object
from keras_paligemma.tasks.locations import from_locations
from keras_paligemma.tasks.locations import to_locations
from keras_paligemma.tasks.objects import Object


def random_boxes(count):
    random = np.random.default_rng(0)
    return np.sort(random.random((count, 2, 2)), 1).reshape(-1, 4)


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(locations)
    assert result.attempted and not result.failed


def test_100_000_boxes_come_back():
    boxes = random_boxes(100_000)
    tokens = to_locations(boxes)
    again = from_locations(tokens)
    assert np.abs(again - boxes).max() <= 1 / 2046
    np.testing.assert_array_equal(to_locations(again), tokens)


def test_100_000_boxes_of_whole_pixels_come_back():
    """Half a bin is less than half a pixel for sides of up to 1022 pixels."""
    random = np.random.default_rng(1)
    sides = np.tile(random.integers(1, 1023, (100_000, 2)), 2)
    pixels = (random_boxes(100_000) * sides).astype(int)
    again = from_locations(to_locations(pixels / sides)) * sides
    np.testing.assert_array_equal(np.rint(again), pixels)


def test_the_reading_by_1024():
    boxes = random_boxes(1_000)
    tokens = to_locations(boxes, scale=1024)
    again = from_locations(tokens, scale=1024)
    assert np.abs(again - boxes).max() <= 1 / 1024
    np.testing.assert_array_equal(to_locations(again, 1024), tokens)
    assert to_locations([1, 0.9999, 0, 0], 1024).max() == 1023


@pytest.mark.parametrize("scale", [1023, 1024])
def test_every_token_comes_back(scale):
    tokens = np.arange(1024)
    np.testing.assert_array_equal(
        to_locations(from_locations(tokens, scale), scale), tokens
    )


def test_rounds_as_boxes_are_written():
    boxes = np.vstack([random_boxes(500), np.arange(4) * 0.5 / 1023])
    for box, tokens in zip(boxes, to_locations(boxes), strict=True):
        text = "".join(f"<loc{number:04d}>" for number in tokens)
        assert text == write_object(Object(box))


@pytest.mark.parametrize("box", [[0, 0, 1, 1.01], [-0.1, 0, 1, 1], [np.nan]])
def test_what_is_no_share_is_refused(box):
    with pytest.raises(ValueError, match="Expected: 0 to 1"):
        to_locations(box)


@pytest.mark.parametrize("tokens", [[1024], [-1], [0.5]])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValueError, match="whole numbers, 0 to 1023"):
        from_locations(tokens)


def test_other_scales_are_refused():
    for convert in (to_locations, from_locations):
        with pytest.raises(ValueError, match="1023 or 1024"):
            convert([0], 1000)


def test_no_boxes():
    assert to_locations(np.zeros((0, 4))).shape == (0, 4)
    assert from_locations(np.zeros((0, 4), int)).shape == (0, 4)
