"""supervision's detections, with the real package."""

import doctest
import sys
import warnings

import numpy as np
import pytest

from keras_paligemma.tasks import detections
from keras_paligemma.tasks.detections import from_detections
from keras_paligemma.tasks.detections import to_detections
from keras_paligemma.tasks.objects import Object

with warnings.catch_warnings():
    # supervision warns that OpenCV, an optional dependency, is missing.
    warnings.simplefilter("ignore", UserWarning)
    import supervision

SIZE = (32, 64)
BOXES = ((0.25, 0.125, 0.75, 0.5), (0, 0.5, 1, 1))


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(detections)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("mask", [None, np.eye(16, 24, dtype=bool)])
@pytest.mark.parametrize("score", [None, 0.5])
def test_there_and_back(mask, score):
    objects = [
        Object(BOXES[0], "dog", score, mask),
        Object(BOXES[1], "cat", score, None if mask is None else mask[:, :9]),
    ]
    made = to_detections(objects, SIZE)
    assert isinstance(made, supervision.Detections)
    assert made.class_id.tolist() == [1, 0]
    np.testing.assert_array_equal(made.xyxy[0], (8, 8, 32, 24))
    found = from_detections(made, SIZE)
    for item, other in zip(found, objects, strict=True):
        assert (item.box, item.label) == (other.box, other.label)
        assert item.score == other.score
        assert (item.mask is None) == (other.mask is None)
        if item.mask is not None:
            size = item.mask_in(SIZE), other.mask_in(SIZE)
            np.testing.assert_array_equal(*size)


def test_what_not_all_objects_have_is_left_out():
    objects = [Object(BOXES[0], "a", 0.5), Object(BOXES[1], "b")]
    made = to_detections(objects, SIZE, ["b", "c", "a"])
    assert made.confidence is None and made.mask is None
    assert made.class_id.tolist() == [2, 0]
    assert len(to_detections([], SIZE)) == 0
    with pytest.raises(ValueError, match=r"\['c'\].*Received: \['a', 'b'\]"):
        to_detections(objects, SIZE, ["c"])


def test_names_of_classes():
    made = supervision.Detections(np.array([[0, 0, 9, 9.0]]))
    assert from_detections(made, SIZE)[0].label == ""
    made.class_id = np.array([4])
    assert from_detections(made, SIZE)[0].label == "4"
    assert from_detections(made, SIZE, {4: "owl"})[0].label == "owl"
    made.mask = np.ones((1, 9, 9), bool)
    with pytest.raises(ValueError, match=r"\(32, 64\).*\(9, 9\)"):
        from_detections(made, SIZE)


@pytest.mark.parametrize("classes", [["cat"], {0: "cat"}])
@pytest.mark.parametrize("number", [-1, 1])
def test_a_class_without_a_name(classes, number):
    found = supervision.Detections(
        np.array([[0, 0, 9, 9.0]]), class_id=np.array([number])
    )
    with pytest.raises(ValueError, match=rf"\[{number}\]. Expected: of \[0\]"):
        from_detections(found, SIZE, classes)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        to_detections([], SIZE)
