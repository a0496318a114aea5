import doctest
import sys

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks import masks
from keras_paligemma.tasks import outlines


def random_masks(count):
    """Draw noise of any density: many parts, holes, and touching corners."""
    random = np.random.default_rng(0)
    for _ in range(count):
        size = tuple(random.integers(1, 25, 2))
        yield random.random(size) < random.random()


def ring():
    y, x = np.mgrid[:60, :80]
    distance = np.hypot(y - 30, x - 40)
    return (distance < 28) & (distance > 9)


def test_examples_of_the_docstrings_run():
    for module in (masks, outlines):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


def test_bounds():
    mask = np.zeros((9, 12), bool)
    mask[2, 3] = mask[6, 11] = True
    assert masks.bounds(mask) == (2, 3, 7, 12)
    with pytest.raises(ValueError, match="no box"):
        masks.bounds(np.zeros((3, 4), bool))


def test_polygons_come_back_as_the_same_mask():
    for mask in [*random_masks(150), ring()]:
        polygons = masks.to_polygons(mask)
        if not mask.any():
            assert polygons == []
            continue
        again = masks.from_polygons(polygons, mask.shape)
        np.testing.assert_array_equal(again, mask)


def test_polygons_are_few_and_short():
    square = np.zeros((9, 9), bool)
    square[2:5, 3:7] = True
    assert masks.to_polygons(square) == [[3, 2, 7, 2, 7, 5, 3, 5]]
    # Each part is one polygon; a part with a hole is two.
    square[7, 8] = True
    assert len(masks.to_polygons(square)) == 2
    assert len(masks.to_polygons(ring())) == 2


def test_polygons_cover_the_pixels_within():
    """Points may be between pixels and outside of the picture."""
    flat = [10.5, -3, 30.2, 5.5, 45, 22, 12, 18.7]
    points = np.array(flat).reshape(-1, 2)
    mask = masks.from_polygons([flat], (20, 40))
    # Distances of pixel centres to the four sides, positive inside.
    y, x = np.mgrid[:20, :40] + 0.5
    ways = np.roll(points, -1, 0) - points
    distance = np.min(
        [
            ((y - start[1]) * way[0] - (x - start[0]) * way[1]) / np.hypot(*way)
            for start, way in zip(points, ways, strict=True)
        ],
        0,
    )
    assert mask[distance > 0.7].all() and not mask[distance < -0.7].any()
    np.testing.assert_array_equal(masks.from_polygons([points], (20, 40)), mask)
    both = masks.from_polygons([flat, [0, 0, 3, 0, 3, 3, 0, 3]], (20, 40))
    mask[:3, :3] = True
    np.testing.assert_array_equal(both, mask)


@pytest.mark.parametrize(
    "polygons",
    [
        [[]],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[0, 0, 1, 1, np.nan, 0]],
        # pycocotools ends the process, for want of memory.
        [[0, 0, 4, 4, -(2**31), 0]],
        [["a"] * 6],
        [{"x": 1}],
        [1, 2, 3, 4, 5, 6],
    ],
)
def test_what_is_no_polygon_is_refused(polygons):
    with pytest.raises(ValueError, match="Polygon 0 is none"):
        masks.from_polygons(polygons, (5, 5))


def test_no_polygons_are_refused():
    with pytest.raises(ValueError, match="one polygon or more"):
        masks.from_polygons([], (5, 5))


def test_segmentations_are_polygons_or_run_lengths():
    mask = ring()
    for held in (masks.to_polygons(mask), masks.to_rle(mask)):
        np.testing.assert_array_equal(
            masks.from_segmentation(held, mask.shape), mask
        )
    with pytest.raises(ValueError, match="another size"):
        masks.from_segmentation(masks.to_rle(mask), (9, 9))
    for nothing in (None, "04", 3):
        with pytest.raises(ValueError, match="no mask. Expected: a list"):
            masks.from_segmentation(nothing, (9, 9))
    with pytest.raises(ValueError, match="no mask"):
        masks.from_segmentation([], (9, 9))


def test_run_lengths_come_back():
    large = np.zeros((1200, 900), bool)
    large[5:1100, 200:700] = large[3, 850] = True
    for mask in [*random_masks(80), ring(), large]:
        runs = masks.to_rle(mask)
        assert runs["size"] == list(mask.shape) and type(runs["counts"]) is str
        again = masks.from_rle(runs, mask.shape)
        assert again.dtype == bool
        np.testing.assert_array_equal(again, mask)
        packed = runs | {"counts": runs["counts"].encode()}
        np.testing.assert_array_equal(masks.from_rle(packed), mask)


def test_run_lengths_as_numbers():
    """COCO's crowds are encoded by columns, starting with the background."""
    mask = masks.from_rle({"size": [2, 3], "counts": [1, 2, 3]})
    np.testing.assert_array_equal(mask, [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    "runs",
    [
        {"size": [2, 3]},
        {"counts": [6]},
        {"size": [2, 3], "counts": [1, 2]},
        {"size": [2, 3], "counts": None},
        {"size": "ab", "counts": [6]},
        {"size": [2], "counts": [2]},
        {"size": [-2, -3], "counts": [6]},
        {"size": [10**6, 10**6], "counts": "04"},
        {"size": [2, 3], "counts": [-1, 7]},
        {"size": [2, 3], "counts": [6.0]},
        {"size": [2, 3], "counts": [[6]]},
        {"size": [2, 3], "counts": []},
        # pycocotools gives pixels for these, or crashes.
        {"size": [2, 3], "counts": ""},
        {"size": [2, 3], "counts": "0"},
        {"size": [2, 3], "counts": "zzzz"},
        {"size": [2, 3], "counts": "P"},
        {"size": [2, 3], "counts": "\x00"},
        {"size": [2, 3], "counts": "é"},
        [],
        None,
    ],
)
def test_what_are_no_run_lengths_is_refused(runs):
    with pytest.raises(ValueError, match="no run lengths"):
        masks.from_rle(runs)


def test_run_lengths_of_another_picture_are_refused():
    with pytest.raises(ValueError, match="another size"):
        masks.from_rle({"size": [2, 3], "counts": [6]}, (3, 2))


def test_missing_pycocotools_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    for call in (
        lambda: masks.to_rle(ring()),
        lambda: masks.from_polygons([[0, 0, 1, 0, 1, 1]], (2, 2)),
    ):
        with pytest.raises(ImportError, match="keras_paligemma.eval"):
            call()
    assert masks.to_polygons(ring())


def test_paste_as_the_original_does():
    """Use the lines of its evaluator: resize by Pillow, then the sign."""
    random = np.random.default_rng(0)
    part = random.normal(size=(64, 64)).astype("float32")
    edges, size = (3, 5, 40, 90), (50, 100)
    resized = Image.fromarray(part).resize(
        [85, 37], resample=Image.Resampling.BILINEAR
    )
    wanted = np.zeros(size, bool)
    wanted[3:40, 5:90] = np.asarray(resized) > 0.0
    found = masks.paste(part, edges, size)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, wanted)


def test_paste_at_the_edges():
    whole = np.ones((64, 64), bool)
    assert masks.paste(whole, (0, 0, 3, 4), (3, 4)).all()
    assert not masks.paste(whole, (2, 4, 2, 4), (3, 4)).any()
    assert masks.paste(whole, (2, 3, 3, 4), (3, 4)).sum() == 1
    for edges in ((0, 0, 4, 4), (-1, 0, 3, 4), (2, 0, 1, 4)):
        with pytest.raises(ValueError, match="not inside its picture"):
            masks.paste(whole, edges, (3, 4))


def test_what_is_no_mask_is_refused():
    for wrong in (np.ones((2, 2)), np.ones(3, bool), np.ones((1, 2, 2), bool)):
        for call in (masks.bounds, masks.to_polygons, masks.to_rle):
            with pytest.raises(ValueError, match="bool array"):
                call(wrong)
