import base64
import io
import pathlib

import keras
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data.object_set import size_of_file
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.preprocessing.images import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), "uint8")


def encoded(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def test_arrays_and_tensors():
    for image in (
        PIXELS,
        PIXELS.astype("int64"),
        PIXELS.astype("float32"),
        PIXELS.astype("uint16") * 257,
        PIXELS.astype(">u2") * 257,
        keras.ops.convert_to_tensor(PIXELS),
        keras.ops.convert_to_tensor(PIXELS, "float32"),
        PIXELS[..., [0, 1, 2, 0]],
    ):
        np.testing.assert_array_equal(read_image(image), PIXELS)


def test_bfloat16():
    np.testing.assert_array_equal(
        read_image((PIXELS // 2).astype(ml_dtypes.bfloat16)), PIXELS // 2
    )


def test_grey_gets_three_channels():
    grey = PIXELS[..., 0]
    expected = np.stack([grey] * 3, -1)
    np.testing.assert_array_equal(read_image(grey), expected)
    np.testing.assert_array_equal(read_image(grey[..., None]), expected)
    np.testing.assert_array_equal(read_image(Image.fromarray(grey)), expected)


def test_fractions_are_rounded():
    image = np.full((2, 2, 3), [0.4, 99.6, 254.5])
    assert read_image(image)[0, 0].tolist() == [0, 100, 254]


def test_files(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(PIXELS).save(path)
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(read_image(source), PIXELS)


@pytest.mark.parametrize("type", ["png", "jpeg;charset=utf-8"])
def test_files_within_strings_dictionaries_and_objects(tmp_path, type):
    file = encoded(Image.fromarray(PIXELS))
    path = tmp_path / "a cat.png"
    path.write_bytes(file)
    text = base64.b64encode(file).decode()
    with open(path, "rb") as opened:
        opened.read(7)
        for source in (
            f"data:image/{type};base64,{text}",
            f"data:image/{type};base64,{text.replace('+', '%2B')}",
            "data:," + "".join(f"%{byte:02x}" for byte in file),
            {"bytes": file, "path": None},
            {"bytes": file, "path": "elsewhere.png"},
            {"bytes": None, "path": str(path)},
            {"path": path},
            io.BytesIO(file),
            bytearray(file),
            opened,
            opened,  # Kept open, and read from its start.
            path.as_uri(),
            f"file://localhost{path}".replace(" ", "%20"),
            str(path).replace("/", "\\"),
        ):
            np.testing.assert_array_equal(read_image(source), PIXELS)


def test_paths_of_data_files(tmp_path):
    (tmp_path / "a\\b.png").write_bytes(b"")
    folder = str(tmp_path)
    for name, path in {
        "a.png": f"{folder}/a.png",
        "/data/a.png": "/data/a.png",
        "./train\\cats\\a.png": f"{folder}/./train/cats/a.png",
        "a\\b.png": f"{folder}/a\\b.png",  # A file with that name.
        "file:///data/50%25.png": "/data/50%.png",
        "file://train/a.png": f"{folder}/train/a.png",
        "https://example.org/a.png": "https://example.org/a.png",
        "data:image/png;base64,AA": "data:image/png;base64,AA",
    }.items():
        assert picture_path(name, folder) == path
    assert picture_path(pathlib.Path("a.png")) == "a.png"


@pytest.mark.parametrize("start", ["data:image/png;base64,", "/9j/4AAQ"])
def test_long_names_are_cut_in_messages(start):
    with pytest.raises(ValueError) as raised:
        read_image(start + "QUJD" * 500_000)
    message = str(raised.value)
    assert start in message and "2,000,0" in message and len(message) < 400


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_formats(format):
    image = Image.fromarray(np.full((8, 8, 3), [250, 10, 10], "uint8"))
    received = read_image(encoded(image, format))
    assert abs(received.astype(int) - [250, 10, 10]).max() < 20


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(gif)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_dropped(mode):
    # A palette colour that older Pillow versions convert to.
    image = Image.new("RGBA", (3, 2), (204, 204, 204, 255)).convert(mode)
    assert read_image(image).tolist() == [[[204] * 3] * 3] * 2


def test_what_alpha_hides_becomes_visible():
    image = np.dstack([PIXELS, np.zeros((6, 4), "uint8")])
    np.testing.assert_array_equal(read_image(image), PIXELS)
    for source in (Image.fromarray(image), encoded(Image.fromarray(image))):
        np.testing.assert_array_equal(read_image(source), PIXELS)


@pytest.mark.parametrize("transparency", [None, 0, b"\x00\xff"])
def test_palette(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 100, 0])
    image.putpixel((1, 0), 1)
    options = {} if transparency is None else {"transparency": transparency}
    received = read_image(encoded(image, **options))
    assert received.tolist() == [[[9, 8, 7], [200, 100, 0]]]


def test_16_bits_are_scaled():
    values = np.array([[0, 257, 32896, 65535]], "uint16")
    expected = [[[v] * 3 for v in (0, 1, 128, 255)]]
    assert read_image(values).tolist() == expected
    png = encoded(Image.fromarray(values))
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode.startswith("I")
    assert read_image(png).tolist() == expected
    wide = Image.fromarray(values.astype("int32"))
    assert wide.mode == "I" and read_image(wide).tolist() == expected
    dark = Image.fromarray(np.array([[0, 200]], "int32"))
    with pytest.raises(ValueError, match="0 to 200 in Pillow's mode 'I'"):
        read_image(dark)


def test_other_modes():
    cmyk = Image.new("RGB", (2, 2), (250, 10, 10)).convert("CMYK")
    assert read_image(cmyk)[0, 0].tolist() == [250, 10, 10]
    assert read_image(Image.new("1", (2, 2), 1))[0, 0].tolist() == [255] * 3
    assert read_image(Image.new("F", (2, 2), 7.2))[0, 0].tolist() == [7] * 3


def test_exif_rotation_is_applied():
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotated by 90° to the left.
    received = read_image(encoded(image, exif=exif))
    np.testing.assert_array_equal(received, np.rot90(PIXELS, -1))


@pytest.mark.parametrize(
    ("place", "value", "turned"),
    [
        (17, 0, True),  # Type of a text's tag: struct.error in Pillow.
        (17, 26, True),  # TypeError in Pillow.
        (9, 0, False),  # Header: SyntaxError in Pillow.
    ],
)
def test_broken_exif_is_ignored(place, value, turned):
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = 6
    damaged = bytearray(exif.tobytes())
    damaged[place] = value
    file = encoded(Image.fromarray(PIXELS), exif=bytes(damaged))
    expected = np.rot90(PIXELS, -1) if turned else PIXELS
    np.testing.assert_array_equal(read_image(file), expected)
    assert size_of_file(file) == expected.shape[:2]


def test_errors_of_any_type_in_pillow_are_those_of_a_picture(monkeypatch):
    def fail(file):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match="could not be read.*Failed to decode"):
        read_image(b"damaged AVIF")


def test_the_input_stays_as_it_is():
    image = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    read_image(image)
    assert image.mode == "RGBA"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((2, 2, 3), 256), "out of range.*256"),
        (np.full((2, 2, 3), -1), "out of range.*-1"),
        (np.full((2, 2, 3), np.nan), "out of range.*nan"),
        (np.full((2, 2, 3), np.inf), "out of range.*inf"),
        (np.full((2, 2, 3), -0.5), "out of range"),
        (np.full((2, 2, 3), 0.5), "almost black.*multiply"),
        (np.ones((2, 2, 3), "float32"), "almost black"),
        (np.ones((2, 2, 3), bool), "not made of numbers.*bool"),
        (np.ones((2, 2, 3), complex), "not made of numbers.*complex"),
        ({"image": 1}, "not made of numbers.*object"),
        (np.zeros((3, 20, 20), "uint8"), "unknown shape.*channels last"),
        (np.zeros((0, 2, 3), "uint8"), "unknown shape"),
        (np.zeros(3, "uint8"), "unknown shape"),
        (np.zeros((1, 2, 2, 3), "uint8"), r"is several.*\(1, 2, 2, 3\)"),
        (7, "unknown shape"),
        (b"", "could not be read"),
        ({"bytes": None, "path": None}, "holds no picture.*'bytes'"),
        ("https://example.org/a.png", "an address.*download"),
        ("data:image/png;base64,A", "could not be read.*base64"),
        (io.StringIO("cat"), "could not be read"),
        (b"no picture", "could not be read"),
        ("nowhere.png", "nowhere.png.*could not be read"),
        (pathlib.Path("nowhere.png"), "nowhere.png.*could not be read"),
        (Image.fromarray(np.array([[70000]], "int32")), "more than 16 bits"),
        (Image.new("La", (2, 2)), "could not be read.*from La"),
    ],
)
def test_errors_name_the_picture(image, message):
    with pytest.raises(ValueError, match=f"(?s)the third.*{message}"):
        read_image(image, "the third")


def test_black_floats_are_a_picture():
    assert read_image(np.zeros((2, 2, 3), "float32")).max() == 0


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_files_are_an_error(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "uint8")
    file = encoded(Image.fromarray(noise), format)
    file = file[: len(file) // 2]
    with pytest.raises(ValueError, match="image could not be read"):
        read_image(file)


def test_pillow_images_that_are_not_read_yet():
    file = encoded(Image.fromarray(PIXELS))
    with Image.open(io.BytesIO(file)) as image:
        np.testing.assert_array_equal(read_image(image), PIXELS)
    with Image.open(io.BytesIO(file[:-30])) as image:
        with pytest.raises(ValueError, match="image could not be read"):
            read_image(image)


def test_decompression_bombs_are_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="could not be read.*bomb"):
        read_image(encoded(Image.fromarray(PIXELS)))
