import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.tasks.boxes import Box
from keras_paligemma.tasks.boxes import draw_boxes
from keras_paligemma.tasks.boxes import encode_box
from keras_paligemma.tasks.boxes import parse_boxes

GREY = np.full((112, 224, 3), 128, "uint8")


def test_needs_neither_keras_nor_kerashub():
    code = (
        "import sys, keras_paligemma.tasks.boxes; "
        "assert not {'keras', 'keras_hub', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_location_survives_the_round_trip():
    for location in range(0, 1023, 4):
        tokens = f"<loc{location:04d}><loc0007><loc1023><loc0900>"
        (box,) = parse_boxes(f"{tokens} cat")
        assert encode_box(box) == tokens


def test_the_edges_of_the_picture_are_exact():
    tokens = encode_box((0, 0, 1, 1))
    assert tokens == "<loc0000><loc0000><loc1023><loc1023>"
    assert parse_boxes(tokens) == [Box(0.0, 0.0, 1.0, 1.0, "")]


def test_rounds_as_the_original_does():
    # Half a bin goes to the even one, as `tf.round` has it.
    assert encode_box((0.5 / 1023, 1.5 / 1023, 1, 1)).startswith(
        "<loc0000><loc0002>"
    )


def test_boxes_in_pixels_need_the_size():
    assert encode_box((0, 56, 28, 224), (112, 224)) == encode_box(
        (0, 0.25, 0.25, 1)
    )


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 50, 50),
        (-0.1, 0, 1, 1),
        (0.5, 0, 0.4, 1),
        (0, 0, 1, np.nan),
        (0, 0, 1),
    ],
)
def test_a_box_that_does_not_fit_is_an_error(box):
    with pytest.raises(ValueError, match="size=.height, width"):
        encode_box(box)


def test_reads_several_boxes_with_labels():
    cat, dog = encode_box((0, 0, 0.5, 0.5)), encode_box((0.5, 0.5, 1, 1))
    found = parse_boxes(f"{cat} cat ; {dog} black dog")
    assert [box.label for box in found] == ["cat", "black dog"]
    np.testing.assert_allclose(found[1][:4], (0.5, 0.5, 1, 1), atol=1e-3)
    # Some answers lack the separator.
    assert parse_boxes(f"{cat} cat {dog} black dog") == found


def test_passes_over_masks():
    tokens = encode_box((0, 0, 1, 1))
    masks = "".join(f"<seg{i:03d}>" for i in range(16))
    assert parse_boxes(f"{tokens}{masks} cat")[0].label == "cat"


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "a cat",
        "<loc0001><loc0002><loc0003> cat",
        "<loc0001><loc0002><loc0003><loc0004><loc0005> cat",
        "<loc0001><loc0002><loc0003><loc1024> cat",
        "<loc0009><loc0002><loc0003><loc0004> cat",
        "<loc0001><loc0002> cat <loc0003><loc0004>",
        "<loc1><loc2><loc3><loc4> cat",
        " ; ; ",
    ],
)
def test_skips_what_is_no_box(malformed):
    assert parse_boxes(malformed) == []
    whole = "<loc0000><loc0000><loc1023><loc1023> dog"
    assert [b.label for b in parse_boxes(f"{malformed} ; {whole}")] == ["dog"]
    assert [b.label for b in parse_boxes(f"{whole} ; {malformed}")] == ["dog"]


def test_draws_at_the_edges_of_the_box_only():
    box = Box(0.25, 0.25, 0.75, 0.75)
    pixels = np.asarray(draw_boxes(GREY, [box]))
    assert pixels.shape == (224, 448, 3)
    changed = (pixels != 128).any(axis=-1)
    y1, x1, y2, x2 = (np.array(box[:4]) * (223, 447, 223, 447)).astype(int)
    assert changed[y1 + 1, x1:x2].all() and changed[y2, x1:x2].all()
    assert changed[y1:y2, x1 + 1].all() and changed[y1:y2, x2].all()
    assert not changed[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5].any()
    assert not changed[: y1 - 1].any() and not changed[:, : x1 - 1].any()


def colours(image):
    """The colours of a picture that are not grey."""
    _, colours = zip(*image.getcolors(1 << 20), strict=True)
    return {c for c in colours if max(c) - min(c) > 90}


def test_one_colour_a_label():
    cat, dog = Box(0.1, 0.1, 0.3, 0.3, "cat"), Box(0.5, 0.5, 0.9, 0.9, "dog")
    again = Box(0.4, 0.1, 0.9, 0.3, "cat")
    picture = np.full((500, 500, 3), 128, "uint8")
    one, two = (
        draw_boxes(picture, [cat, again]),
        draw_boxes(picture, [cat, dog]),
    )
    at = (int(0.1 * 499) + 1, int(0.7 * 499))
    assert one.getpixel(at) in colours(draw_boxes(picture, [cat]))
    at = (int(0.5 * 499) + 1, int(0.7 * 499))
    assert two.getpixel(at) not in colours(one)


def test_labels_stay_inside_the_picture():
    box = Box(0.0, 0.97, 0.1, 1.0, "a rather long label")
    plain = draw_boxes(GREY, [box._replace(label="")])
    changed = np.asarray(draw_boxes(GREY, [box])) != np.asarray(plain)
    rows, columns = np.nonzero(changed.any(axis=-1))
    assert np.ptp(columns) > 100 and np.ptp(rows) > 10


def test_takes_paths_and_pictures_and_leaves_them_alone(tmp_path):
    path = tmp_path / "picture.png"
    picture = Image.fromarray(GREY)
    picture.save(path)
    box = Box(0.25, 0.25, 0.75, 0.75, "cat")
    drawn = [draw_boxes(one, [box]) for one in (GREY, picture, path, str(path))]
    assert len({one.tobytes() for one in drawn}) == 1
    np.testing.assert_array_equal(picture, GREY)
    assert draw_boxes(picture.convert("LA"), [box]).mode == "RGB"


def test_large_pictures_keep_their_size():
    picture = Image.new("RGB", (600, 300))
    assert draw_boxes(picture, []).size == (600, 300)
    draw_boxes(picture, [Box(0, 0, 1, 1, "cat")])
    assert picture.getcolors() == [(600 * 300, (0, 0, 0))]


def test_draws_what_the_model_sees(tmp_path):
    """One reader: 16 bits, floats, alpha and EXIF look as in training."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = np.arange(480, dtype="uint16")[:, None] * np.ones(500, "uint16")
    Image.fromarray(rows * 128).save(tmp_path / "16.png")
    Image.new("RGB", (60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    hidden = np.dstack([np.full((480, 500, 3), 77, "uint8"), rows % 256])
    Image.fromarray(hidden.astype("uint8")).save(tmp_path / "alpha.png")
    file = (tmp_path / "16.png").read_bytes()
    for picture in (
        tmp_path / "16.png",
        file,
        io.BytesIO(file),
        {"bytes": file, "path": None},
        Image.open(tmp_path / "16.png"),
        rows * 128,
        (rows % 256).astype("float32"),
        tmp_path / "alpha.png",
    ):
        np.testing.assert_array_equal(
            draw_boxes(picture, []), read_image(picture)
        )
    # 32768 of 65535, in the middle of grey.
    drawn = draw_boxes(tmp_path / "16.png", [])
    assert drawn.getpixel((0, 256)) == (128, 128, 128)
    assert draw_boxes(tmp_path / "turned.jpg", []).size == (240, 480)
    with pytest.raises(ValueError, match="almost black"):
        draw_boxes(rows / rows.max(), [])
