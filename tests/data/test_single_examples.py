"""A single example: its fields, and how they are checked."""

import doctest
import pickle

import numpy as np
import pytest

from keras_paligemma.data import ExampleError
from keras_paligemma.data import examples
from keras_paligemma.data.examples import frames_of


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(examples)
    assert result.attempted and not result.failed


def test_one_picture_or_frames():
    picture = np.zeros((2, 3, 3))
    assert frames_of(picture)[0] is picture
    assert frames_of({"bytes": b"", "path": None}) == [
        {"bytes": b"", "path": None}
    ]
    for two in (["a", "b"], ("a", "b"), np.array(["a", "b"], object)):
        assert frames_of(two) == ["a", "b"]
    assert [frame.shape for frame in frames_of(np.zeros((2, 4, 5, 3)))] == [
        (4, 5, 3)
    ] * 2
    with pytest.raises(ValueError, match="no picture"):
        frames_of([])


def test_the_remainder_travels_between_processes():
    error = ExampleError("a.json, image 3: a box", {"prompts": "detect cat"})
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and copy.remainder == error.remainder
