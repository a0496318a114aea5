"""Pixels decoded by the graph, compared with Python's."""

import numpy as np
import pytest
from PIL.PngImagePlugin import PngInfo

from keras_paligemma import PaliGemmaImageConverter
from tests.helpers.encoded_pictures import bomb
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.helpers.encoded_pictures import pictures
from tests.helpers.encoded_pictures import turned

tf = pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def read():
    """Return a function that decodes files under a given resize rule."""
    from keras_paligemma.export.pictures import read_pictures

    compiled = {
        rule: tf.function(
            lambda files, rule=rule: read_pictures(files, (40, 40), rule),
            input_signature=[tf.TensorSpec([None], tf.string)],
        )
        for rule in ("bilinear", "bilinear_antialias", "bicubic")
    }

    def run(files, rule="bilinear"):
        pixels, errors = compiled[rule](tf.constant(files, tf.string))
        return pixels.numpy(), [error.decode() for error in errors.numpy()]

    return run


@pytest.mark.parametrize("rule", ["bilinear", "bilinear_antialias", "bicubic"])
def test_pixels_are_pythons(read, rule):
    files = pictures()
    pixels, errors = read(list(files.values()), rule)
    assert errors == [""] * len(files)
    wanted = PaliGemmaImageConverter(40, resize=rule)(list(files.values()))
    worst = np.abs(pixels - wanted).max((1, 2, 3))
    assert dict(zip(files, worst, strict=True)) == dict.fromkeys(files, 0)


@pytest.mark.parametrize(
    "shape", [(70, 54), (70, 56), (54, 70), (35, 17), (60, 30), (200, 39)]
)
def test_bicubic_takes_the_axes_in_pillows_order(shape):
    from keras_paligemma.export.pictures import RULES
    from keras_paligemma.preprocessing.resize import bicubic

    image = np.random.default_rng(0).integers(0, 256, (*shape, 3))
    image = image.astype("uint8")
    found = RULES["bicubic"](image, (40, 40))
    np.testing.assert_array_equal(found, bicubic(image, (40, 40)))


def test_turned_pictures_differ(read):
    files = pictures()
    pixels, _ = read([files[f"turned {n}"] for n in range(1, 9)])
    assert len(np.unique(pixels.reshape(8, -1), axis=0)) == 8


def test_xmp_turns_pictures_without_exif(read):
    image = picture()

    def described(format, text, **options):
        if format == "PNG":
            info = PngInfo()
            info.add_itxt("XML:com.adobe.xmp", text)
            return encode(image, format, pnginfo=info, **options)
        return encode(image, format, xmp=text.encode(), **options)

    files = []
    for format in ("JPEG", "PNG", "WEBP"):
        for text in ('tiff:Orientation="6"', "<tiff:Orientation>8<", "of é"):
            files.append(described(format, text))
        # That of EXIF is used, even if it is none.
        for number in (3, 9):
            files.append(
                described(format, 'tiff:Orientation="6"', exif=turned(number))
            )
        files.append(described(format, 'tiff:Orientation="9"'))
    pixels, errors = read(files)
    assert errors == [""] * len(files)
    np.testing.assert_array_equal(pixels, PaliGemmaImageConverter(40)(files))
    assert len(np.unique(pixels[6:12].reshape(6, -1), axis=0)) == 4


def test_bad_files_spoil_no_others(read):
    files = pictures()
    good = files["jpeg"]
    bad = {
        "": b"",
        "text": b"caption en",
        "bomb": bomb(),
        "overflow": bomb(2**31 - 1, 2**31 - 1),
        "blank": bomb(0, 0),
        "cut": files["jpeg"][:-200],
        "cut png": files["png"][:-90],
        "cut webp": files["webp"][:60],
        "head": files["webp"][:14],
        "cut gif": files["gif"][:100],
        "jpeg's head": b"\xff\xd8\xff\xe1\0\0",
    }
    pixels, errors = read([good, *bad.values(), good])
    assert errors[0] == errors[-1] == ""
    np.testing.assert_array_equal(pixels[0], pixels[-1])
    assert not pixels[1:-1].any()
    named = dict(zip(bad, errors[1:-1], strict=True))
    assert all(named.values()), named
    assert "not a picture" in named[""]
    assert "not a picture" in named["text"]
    assert "20000×20000" in named["bomb"]
    assert "too large" in named["overflow"]
    assert "damaged" in named["cut"]


def moving(*sizes):
    """Return a GIF of frames of some sizes, each of one byte of pixels."""
    content = encode(picture(1, 1).convert("P"), "GIF")
    head, frame = content[: content.index(b"\x2c")], b""
    for width, height in sizes:
        frame += b"\x2c\0\0\0\0" + width.to_bytes(2, "little")
        # A colour table of two colours, then the pixels.
        frame += height.to_bytes(2, "little") + b"\x80" + bytes(6)
        frame += b"\2\2\x44\1\0"
    return head + frame + b";"


def test_what_takes_long_to_decode_is_refused(read):
    """TensorFlow decodes all frames of a GIF, whose header has one size."""
    jpeg = pictures()["jpeg"]
    files = {
        "small": moving((1, 1), (1, 1)),
        "a large frame": moving((1, 1), (14_000, 14_000)),
        "many frames": moving((1, 1), *[(9000, 9000)] * 4),
        "scans": jpeg + b"\xff\xda" * 60,
        "many scans": jpeg + b"\xff\xda" * 64,
    }
    _, errors = read(list(files.values()))
    found = dict(zip(files, errors, strict=True))
    assert found["small"] == found["scans"] == ""
    for name in ("a large frame", "many frames", "many scans"):
        assert "too large" in found[name], (name, found[name])
    assert "14000×14000" in found["a large frame"]


def test_no_pictures(read):
    pixels, errors = read([])
    assert pixels.shape == (0, 40, 40, 3)
    assert errors == []


def test_damaged_bytes_never_raise(read):
    random = np.random.default_rng(0)
    files = []
    for content in pictures().values():
        for _ in range(6):
            damaged = bytearray(content)
            for place in random.integers(0, len(content), 8):
                damaged[place] = random.integers(256)
            damaged = damaged[: random.integers(len(content) // 2, 10**4)]
            files.append(bytes(damaged))
    pixels, errors = read(files)
    assert len(pixels) == len(errors) == len(files)
    assert any(errors)
