import doctest

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks import label_maps
from keras_paligemma.tasks.label_maps import from_label_map
from keras_paligemma.tasks.label_maps import to_label_map


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(label_maps)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("values", [(1, 2, 254), (1, 2, 256), (1, 256, 65535)])
def test_label_maps_come_back(tmp_path, values):
    random = np.random.default_rng(0)
    drawn = random.integers(0, 4, (9, 14))
    parts = {value: drawn == i for i, value in enumerate(values, 1)}
    picture = to_label_map(parts)
    picture.save(tmp_path / "map.png")
    for source in (picture, tmp_path / "map.png", np.asarray(picture)):
        found = from_label_map(source)
        assert tuple(found) == values
        for value, mask in parts.items():
            np.testing.assert_array_equal(found[value], mask)


def test_palettes_and_panoptic_colours():
    """VOC's masks are palette indices, COCO's are ids encoded as colours."""
    picture = Image.new("P", (3, 1))
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.putdata([0, 2, 255])
    found = from_label_map(picture)
    assert {value: mask.tolist() for value, mask in found.items()} == {
        2: [[False, True, False]]
    }
    assert list(from_label_map(picture, ignore=())) == [0, 2, 255]
    colours = np.array([[[0, 0, 0], [7, 1, 2]]], "uint8")
    assert list(from_label_map(colours)) == [7 + 256 + 2 * 65536]
    # Red alone is segment 255, not VOC's border.
    colours[0, 0] = 255, 0, 0
    assert list(from_label_map(colours)) == [255, 7 + 256 + 2 * 65536]
    assert list(from_label_map(colours, (0, 255))) == [7 + 256 + 2 * 65536]


def test_what_a_label_map_cannot_hold_is_refused():
    one, two = np.eye(3, dtype=bool), np.ones((3, 3), bool)
    with pytest.raises(ValueError, match="overlap.*mask 5 over mask 4"):
        to_label_map({4: one, 5: two})
    for wrong in ({}, {0: one}, {65536: one}, {1: one, 2: two[:2]}):
        with pytest.raises(ValueError, match="one size, numbered 1 to 65535"):
            to_label_map(wrong)
    # As an index, a mask of integers would be the numbers of rows.
    with pytest.raises(ValueError, match="bool array.*int64"):
        to_label_map({1: np.ones((3, 3), "int64")})


def test_what_is_no_label_map_is_refused(tmp_path):
    (tmp_path / "map.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        from_label_map(tmp_path / "map.png")
    for wrong in (
        *(np.ones((2, 2)), np.ones(3, int), np.ones((2, 2, 4), int)),
        # As whole numbers, colours of 0 to 1 would be 0: no object at all.
        *(np.full((2, 2, 3), 0.5), np.ones((2, 2, 3), bool)),
    ):
        with pytest.raises(ValueError, match="no map of objects"):
            from_label_map(wrong)
