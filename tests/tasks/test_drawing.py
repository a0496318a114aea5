import doctest

import numpy as np
import pytest
from PIL import Image
from PIL import ImageFont

from keras_paligemma.tasks import drawing
from keras_paligemma.tasks.drawing import COLOURS
from keras_paligemma.tasks.drawing import draw_objects
from keras_paligemma.tasks.drawing import place_labels
from keras_paligemma.tasks.objects import Object

RED = np.array(COLOURS[0])


def grey(height, width):
    return np.full((height, width, 3), 128, "uint8")


def random_objects(count, words=("cat", "a traffic light", "x")):
    random = np.random.default_rng(count)
    corners = np.sort(random.random((count, 2, 2)), 1).reshape(-1, 4)
    return [
        Object(tuple(box), words[i % len(words)], random.random())
        for i, box in enumerate(corners)
    ]


@pytest.fixture
def patches(monkeypatch):
    """Record where each call drew labels: (y1, x1, y2, x2)."""
    calls = []

    def spy(labels, boxes, size):
        places = place_labels(labels, boxes, size)
        calls.append(
            [
                place and (*place, place[0] + label[0], place[1] + label[1])
                for label, place in zip(labels, places, strict=True)
            ]
        )
        return places

    monkeypatch.setattr(drawing, "place_labels", spy)
    return calls


def check_patches(patches, height, width):
    """Check that labels are inside the picture and do not overlap."""
    covered = np.zeros((height, width), int)
    for y1, x1, y2, x2 in patches:
        assert 0 <= y1 < y2 <= height and 0 <= x1 < x2 <= width
        covered[y1:y2, x1:x2] += 1
    assert covered.max() <= 1


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(drawing)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("size", [(112, 112), (300, 700), (20, 500)])
def test_labels_stay_inside_and_apart(patches, size, count):
    picture = draw_objects(grey(*size), random_objects(count))
    drawn = [patch for patch in patches[-1] if patch]
    check_patches(drawn, picture.height, picture.width)
    assert len(drawn) == count or size == (20, 500)
    assert drawn


def test_labels_at_every_edge(patches):
    for box in ((0, 0, 0.1, 0.1), (0.9, 0.9, 1, 1), (0, 0, 1, 1), (1, 1, 1, 1)):
        draw_objects(grey(112, 112), [Object(box, "a long label", 0.5)])
        check_patches(patches[-1], 448, 448)


def test_a_label_keeps_near_to_its_box(patches):
    box = (0.3, 0.3, 0.6, 0.6)
    draw_objects(grey(500, 500), [Object(box, "cat", 0.5)] * 4)
    for y1, x1, y2, x2 in patches[-1]:
        assert x1 <= 300 and x2 >= 150 and y1 <= 300 and y2 >= 120


def test_text_shrinks_and_the_surest_labels_stay(patches):
    """There are more labels than a picture can hold, all for one box."""
    items = [
        Object((0.4, 0.4, 0.6, 0.6), f"number {i}", 1 - i / 1000)
        for i in range(200)
    ]
    draw_objects(grey(112, 112), items)
    height = patches[-1][0][2] - patches[-1][0][0]
    assert drawing.LEAST_TEXT_HEIGHT < height < drawing.TEXT_HEIGHT + 4
    drawn = [patch is not None for patch in patches[-1]]
    assert 50 < sum(drawn) < 200 and all(drawn[:50])
    check_patches([patch for patch in patches[-1] if patch], 448, 448)


def test_a_label_that_is_wider_than_the_picture_is_cut(patches):
    for words in ("word " * 99, "W" * 5000, "two\nlines\tand more"):
        picture = draw_objects(grey(112, 112), [Object((0, 0, 1, 1), words)])
        check_patches(patches[-1], *picture.size)
    # The score is never truncated.
    font = ImageFont.load_default(16)
    for room in (0, 60, 200):
        assert drawing._fit("a long label", "0.93", font, room).endswith("0.93")


@pytest.mark.parametrize("label", ["\ud800", "\x00", "猫", "\u202e", "é" * 99])
def test_any_label_is_drawn(patches, label):
    draw_objects(grey(112, 112), [Object((0, 0, 1, 1), label, 0.5)])
    check_patches(patches[-1], 448, 448)


def test_objects_without_words_have_no_label(patches):
    draw_objects(grey(112, 112), [Object((0, 0, 1, 1))])
    assert patches[-1] == []


@pytest.mark.parametrize("side", [112, 4000])
def test_text_is_legible(patches, side):
    """Text has 16 pixels at 448, also for large pictures shown 1,000 wide."""
    picture = draw_objects(
        grey(side, side), [Object((0.2, 0.2, 0.4, 0.4), "m")]
    )
    ((y1, x1, y2, x2),) = patches[-1]
    shown = (y2 - y1) * min(1, 1000 / picture.width)
    assert shown >= 16
    # Text is white on a red background.
    patch = np.asarray(picture)[y1:y2, x1:x2]
    ink = (patch == 255).all(-1)
    assert 0.05 < ink.mean() < 0.5 and (patch == RED).all(-1).mean() > 0.3


def test_small_pictures_are_enlarged_and_large_ones_stay():
    for size, wanted in (
        ((112, 112), (448, 448)),
        ((1, 1), (448, 448)),
        ((224, 100), (448, 200)),
        ((448, 10), (448, 10)),
        ((500, 600), (500, 600)),
    ):
        drawn = draw_objects(grey(*size[::-1]), [Object((0, 0, 1, 1), "cat")])
        assert drawn.size == wanted and drawn.mode == "RGB"


def test_boxes_are_at_their_edges():
    pixels = np.asarray(
        draw_objects(grey(500, 500), [Object((0.2, 0.3, 0.6, 0.9))])
    )
    changed = (pixels != 128).any(-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max()) == (100, 299)
    assert (columns.min(), columns.max()) == (150, 449)
    assert (pixels[100, 150:450] == RED).all()
    assert (pixels[100:300, 449] == RED).all()
    assert not changed[105:295, 155:445].any()


def test_doubtful_boxes_are_dashed():
    sure, doubtful = (
        np.asarray(
            draw_objects(
                grey(500, 500),
                [Object((0.2, 0.2, 0.8, 0.8), score=s)],
                doubt=0.5,
            )
        )[100:400, 100:400]
        for s in (0.6, 0.4)
    )
    for edge in ([0], [-1], (slice(None), 0), (slice(None), -1)):
        assert (sure[edge] == RED).all()
        share = (doubtful[edge] == RED).all(-1).mean()
        assert 0.4 < share < 0.7 and not (doubtful[edge] == 128).any()


def test_a_line_leads_from_a_label_that_is_not_at_its_box(monkeypatch):
    monkeypatch.setattr(drawing, "place_labels", lambda *_: [(400, 200)])
    one = Object((0.2, 0.2, 0.4, 0.8), "cat")
    pixels = np.asarray(draw_objects(grey(500, 500), [one]))
    assert (pixels[210:390] == RED).all(-1).any(1).all()


def test_a_mask_without_a_pixel_is_not_drawn():
    bare, masked = (
        draw_objects(grey(50, 50), [Object((0.5, 0.2, 0.5, 0.8), mask=mask)])
        for mask in (None, np.ones((8, 8)))
    )
    assert bare.tobytes() == masked.tobytes()


def test_masks_are_blended_and_outlined():
    part = np.zeros((100, 100), bool)
    part[20:80, 20:80] = True
    one = Object((0.2, 0.2, 0.7, 0.7), mask=part)
    pixels = np.asarray(draw_objects(grey(500, 500), [one])).astype(float)
    opacity = drawing.MASK_OPACITY
    blend = 128 * (1 - opacity) + opacity * RED
    # The mask covers rows and columns 150 to 299; lines are 2 pixels wide.
    inside, outside = pixels[154:296, 154:296], pixels[105:150, 105:345]
    assert np.abs(inside - blend).max() <= 0.5
    assert (outside == 128).all()
    # Its corners are rounded by the resizing.
    assert (pixels[152:298, 150:152] == RED).all()
    assert (pixels[298:300, 152:298] == RED).all()


def test_a_mask_at_the_edge_of_the_picture_is_outlined():
    one = Object((0, 0, 1, 1), mask=np.ones((8, 8)))
    pixels = np.asarray(draw_objects(grey(500, 500), [one]))
    assert (pixels[0] == RED).all() and (pixels[:, -1] == RED).all()


def test_one_colour_a_label():
    boxes = [(0.1, 0.1 + 0.2 * i, 0.9, 0.2 + 0.2 * i) for i in range(4)]
    names = ["cat", "dog", "cat", "bird"]
    objects = [Object(b, n) for b, n in zip(boxes, names, strict=True)]
    drawn = draw_objects(grey(500, 500), objects)
    seen = [drawn.getpixel((int(500 * box[1]), 400)) for box in boxes]
    assert seen == [COLOURS[0], COLOURS[1], COLOURS[0], COLOURS[2]]


def test_reads_pictures_as_the_model_does_and_leaves_them_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert draw_objects(tmp_path / "turned.jpg", []).size == (240, 480)
    picture = Image.fromarray(grey(500, 500))
    draw_objects(picture, [Object((0, 0, 1, 1), "cat", mask=np.ones((3, 3)))])
    assert picture.getcolors() == [(500 * 500, (128, 128, 128))]
    with pytest.raises(ValueError, match="could not be read"):
        draw_objects(tmp_path / "missing.png", [])


def test_no_place_is_left():
    assert place_labels([(5, 5)], [(0, 0, 1, 1)], (4, 9)) == [None]
    assert place_labels([(4, 9)] * 2, [(0, 0, 1, 1)] * 2, (4, 9)) == [
        (0, 0),
        None,
    ]
    assert place_labels([], [], (4, 9)) == []
