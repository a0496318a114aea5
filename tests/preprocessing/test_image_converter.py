import io
import json
import pathlib
from collections import UserList

import keras
import numpy as np
import pytest
from PIL import Image

from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.inputs import to_pictures
from keras_paligemma.preprocessing.resize import RULES

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pp.npz"
random = np.random.default_rng(0)
PICTURES = [
    random.integers(0, 256, (*size, 3), "uint8")
    for size in ((9, 14), (28, 28), (40, 31))
]


@pytest.fixture
def converter():
    return PaliGemmaImageConverter(28)


@pytest.mark.parametrize("name", ["down", "up", "near"])
def test_model_input_equals_that_of_the_original(name):
    golden = np.load(GOLDEN)
    converter = PaliGemmaImageConverter(28, resize="bilinear_antialias")
    np.testing.assert_array_equal(
        converter(golden[f"image/{name}/in"]),
        golden[f"image/{name}/28/model_input"],
    )


@pytest.mark.parametrize("resize", RULES)
def test_each_rule_is_used(resize):
    image = PICTURES[2]
    received = PaliGemmaImageConverter((28, 42), resize=resize)(image)
    assert received.dtype == np.float32 and type(received) is np.ndarray
    np.testing.assert_allclose(
        received, RULES[resize](image, (28, 42)) / 127.5 - 1, atol=1e-6
    )


def test_values_span_minus_one_to_one(converter):
    image = np.zeros((28, 28, 3), "uint8")
    image[0] = 255
    assert converter(image).min() == -1 and converter(image).max() == 1


def test_nothing_is_cropped(converter):
    image = np.zeros((28, 280, 3), "uint8")
    image[:, :20] = image[:, -20:] = 255
    assert (converter(image)[:, [0, -1]] == 1).all()


def test_one_and_many(converter, tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(PICTURES[0]).save(path)
    one = converter(PICTURES[0])
    assert one.shape == (28, 28, 3)
    mixed = [
        PICTURES[0],
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(PICTURES[0]),
        keras.ops.convert_to_tensor(PICTURES[0]),
        {"bytes": path.read_bytes(), "path": None},
        io.BytesIO(path.read_bytes()),
        path.as_uri(),
    ]
    np.testing.assert_array_equal(converter(mixed[6]), one)
    np.testing.assert_array_equal(converter(mixed[7]), one)
    for batch in (mixed, tuple(mixed), np.array([str(path)] * 9)):
        received = converter(batch)
        assert received.shape == (9, 28, 28, 3)
        for row in received:
            np.testing.assert_array_equal(row, one)


def test_columns_of_data_sets(converter):
    """Hugging Face reads the values of a column one by one."""
    column = UserList([PICTURES[0], PICTURES[2]])
    pictures, several = to_pictures(column)
    assert several and pictures[1] is PICTURES[2]
    np.testing.assert_array_equal(converter(column), converter(pictures))
    assert converter([UserList(column)] * 3).shape == (3, 2, 28, 28, 3)


def test_lists_of_sizes(converter):
    received = converter(PICTURES)
    for row, picture in zip(received, PICTURES, strict=True):
        np.testing.assert_array_equal(row, converter(picture))


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_batches_and_frames(converter, size, channels):
    batch = random.integers(0, 256, (3, 2, *size, channels), "uint8")
    expected = np.stack([[converter(f) for f in row] for row in batch])
    for frames in (
        batch,
        keras.ops.convert_to_tensor(batch),
        list(batch),
        [list(row) for row in batch],
        [tuple(batch[0]), list(batch[1]), batch[2]],
    ):
        received = converter(frames)
        assert received.shape == (3, 2, 28, 28, 3)
        np.testing.assert_array_equal(received, expected)
    np.testing.assert_array_equal(converter(batch[0]), expected[0])


def test_floats_of_a_batch_are_judged_together(converter):
    # One almost black picture in a batch does not mean a range of [0, 1].
    batch = np.stack([np.ones((28, 28, 3)), np.full((28, 28, 3), 255)])
    assert converter(batch)[1].min() == 1
    with pytest.raises(ValueError, match="`?images`?.*almost black"):
        converter(batch / 255)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "`images` is empty"),
        (np.zeros((0, 28, 28, 3), "uint8"), "`images` is empty"),
        ([[]], r"`images\[0\]` is empty"),
        ([PICTURES[0], b"x"], r"images\[1\] could not be read"),
        ([PICTURES[0], "no.png"], r"images\[1\] \('no.png'\) could not"),
        ([[PICTURES[0], 3.5]], r"images\[0\]\[1\] has an unknown shape"),
        ([PICTURES[:1], PICTURES[:2]], "same number of frames"),
        ([PICTURES[0], PICTURES[:2]], "same number of frames"),
        ([[[PICTURES[0]]]], "nested too deep"),
        ([[[[0, 0, 0]]]], "nested too deep"),
        (np.zeros((1, 1, 1, 28, 28, 3), "uint8"), "nested too deep"),
        (np.zeros((2, 3, 28, 28), "uint8"), "unknown shape"),
    ],
)
def test_errors_say_which_picture(converter, images, message):
    with pytest.raises(ValueError, match=message):
        converter(images)


@pytest.mark.parametrize("size", [0, -1, 2.5, (28,), (28, 28, 3), (28, 0)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="`image_size` must be"):
        PaliGemmaImageConverter(size)


def test_rules_that_are_none():
    with pytest.raises(ValueError, match="`resize` must be one of.*nearest"):
        PaliGemmaImageConverter(28, resize="nearest")


def test_image_size_can_be_set(converter):
    assert converter.image_size == (28, 28)
    converter.image_size = (14, 42)
    assert converter(PICTURES[0]).shape == (14, 42, 3)


def test_config_round_trips():
    converter = PaliGemmaImageConverter((28, 14), resize="bicubic")
    config = json.loads(
        json.dumps(keras.saving.serialize_keras_object(converter))
    )
    again = keras.saving.deserialize_keras_object(config)
    assert again.image_size == (28, 14)
    np.testing.assert_array_equal(again(PICTURES), converter(PICTURES))


def test_symbolic_images_are_an_error(converter):
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices(np.zeros((2, 9, 9, 3), "uint8"))
    with pytest.raises(ValueError, match="not in a TensorFlow graph"):
        data.map(converter)
