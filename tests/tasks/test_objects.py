import doctest
import io

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks import objects
from keras_paligemma.tasks.objects import Object
from keras_paligemma.tasks.objects import Objects
from keras_paligemma.tasks.objects import Skipped

SIZE = (37, 53)


def random_masks(count):
    random = np.random.default_rng(0)
    for _ in range(count):
        size = tuple(random.integers(1, 60, 2))
        mask = random.random(size) < random.random()
        if mask.any():
            yield mask


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(objects)
    assert result.attempted and not result.failed


def test_boxes_in_other_forms():
    one = Object.from_xyxy((5, 3, 50, 30), SIZE, label="cat", score=0.5)
    assert (one.label, one.score) == ("cat", 0.5)
    np.testing.assert_allclose(one.box, (3 / 37, 5 / 53, 30 / 37, 50 / 53))
    np.testing.assert_allclose(one.xyxy(SIZE), (5, 3, 50, 30))
    np.testing.assert_allclose(one.xywh(SIZE), (5, 3, 45, 27))
    np.testing.assert_allclose(one.xyxy(), (*one.box[1::-1], *one.box[:1:-1]))
    assert one.pixels(SIZE) == (3, 5, 30, 50)
    again = Object.from_xywh(one.xywh(SIZE), SIZE)
    np.testing.assert_allclose(again.box, one.box)


def test_whole_pixels_come_back_at_any_size():
    """With `int`, 1 / 49 * 49 would become 0."""
    for side in range(1, 300):
        for edge in {0, 1, side // 3, side - 1, side}:
            one = Object.from_xyxy((edge, 0, side, side), (side, side))
            assert one.pixels((side, side)) == (0, edge, side, side)


def test_masks_come_back_exactly():
    for mask in random_masks(60):
        one = Object.from_mask(mask)
        np.testing.assert_array_equal(one.mask_in(mask.shape), mask)


def test_masks_in_boxes_of_their_own():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 5:25] = True
    wide = Object((0, 0, 1, 1), "cat", 0.5).with_mask(mask)
    assert (wide.label, wide.score, wide.box) == ("cat", 0.5, (0, 0, 1, 1))
    np.testing.assert_array_equal(wide.mask_in((40, 40)), mask)
    narrow = Object((0.5, 0, 1, 1)).with_mask(mask)
    mask[:20] = False
    np.testing.assert_array_equal(narrow.mask_in((40, 40)), mask)
    assert Object((0.55, 0.2, 0.55, 0.2)).with_mask(mask).mask.shape == (1, 1)
    # Rounding leaves boxes without a pixel, at the far edges too.
    whole = np.ones((40, 40), bool)
    for box in ((0.99, 0.2, 1, 0.5), (0.5, 0.2, 0.501, 0.5)):
        assert Object(box).with_mask(whole).mask.shape == (1, 12)
        turned = (*box[1::-1], *box[:1:-1])
        assert Object(turned).with_mask(whole).mask.shape == (12, 1)
    for box in ((0, 0, 0.5, 1), (1, 1, 1, 1)):
        with pytest.raises(ValueError, match="empty within its box"):
            Object(box).with_mask(mask)
    for wrong in (mask.astype("float32"), mask[..., None]):
        with pytest.raises(ValueError, match="bool array .height, width"):
            wide.with_mask(wrong)


def test_masks_at_another_size():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 5:25] = True
    one = Object.from_mask(mask)
    larger = one.mask_in((400, 200))
    np.testing.assert_array_equal(larger, mask.repeat(10, 0).repeat(5, 1))


def test_objects_do_not_change():
    part = np.ones((2, 2))
    one = Object((0, 0, 1, 1), mask=part)
    part[:] = -1
    assert one.mask_in((2, 2)).all()
    with pytest.raises(ValueError, match="read-only"):
        one.mask[:] = -1
    with pytest.raises(AttributeError):
        one.label = "dog"


def test_equality_looks_at_the_mask():
    box, part = (0, 0, 1, 1), np.eye(3)
    assert Object(box, "cat", 0.5, part) == Object(box, "cat", 0.5, part)
    assert len({Object(box, mask=part), Object(box, mask=part)}) == 1
    for other in (
        Object(box, "dog", 0.5, part),
        Object(box, "cat", 0.6, part),
        Object(box, "cat", 0.5, -part),
        Object(box, "cat", 0.5),
        Object((0, 0, 1, 0.5), "cat", 0.5, part),
        "cat",
    ):
        assert Object(box, "cat", 0.5, part) != other


def test_rounding_at_the_edges_is_forgiven():
    one = Object((np.float32(-1e-7), 0, 1 + 1e-7, 1))
    assert one.box == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0, 0.4, 1),
        (0, 0.5, 1, 0.4),
        (0, 0, 1, 1.1),
        (-0.1, 0, 1, 1),
        (0, 0, 1),
        (0, 0, 1, np.nan),
        (0, 0, 30, 50),
    ],
)
def test_a_box_that_fits_no_picture_is_refused(box):
    with pytest.raises(ValueError, match="from_xyxy"):
        Object(box)


def test_scores_and_masks_of_other_kinds_are_refused():
    box = (0, 0, 1, 1)
    with pytest.raises(ValueError, match="score is a number"):
        Object(box, score=float("nan"))
    for mask in (np.ones(3), np.ones((2, 2), int), np.ones((2, 2, 1))):
        with pytest.raises(ValueError, match="fills its box"):
            Object(box, mask=mask)
    with pytest.raises(ValueError, match="has no mask"):
        Object(box).mask_in(SIZE)
    with pytest.raises(ValueError, match="has no box"):
        Object.from_mask(np.zeros((3, 3), bool))


def test_a_sequence_that_shows_itself():
    one = Object((0.1, 0.1, 0.9, 0.9), "cat")
    picture = np.full((112, 150, 3), 128, "uint8")
    found = Objects([one, one], [Skipped("dog", "no box")], "…", picture)
    assert len(found) == 2 and list(found) == [one, one] and found[-1] == one
    assert found == Objects((one, one), (Skipped("dog", "no box"),), "…")
    shown = Image.open(io.BytesIO(found._repr_png_()))
    assert shown.format == "PNG" and shown.size == (450, 336)
    large = Objects([one], image=np.zeros((900, 3000, 3), "uint8"))
    assert Image.open(io.BytesIO(large._repr_png_())).size == (1024, 307)
    assert Objects([one])._repr_png_() is None
    assert not Objects() and "image" not in repr(found)


@pytest.mark.parametrize("size", [(0, 0), (10, 0), (-1, 5), (np.nan, 5)])
def test_a_picture_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match="in pixels. Received: size="):
        Object.from_xyxy((0, 0, 1, 1), size)
