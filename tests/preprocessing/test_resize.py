import pathlib

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.preprocessing.resize import bicubic
from keras_paligemma.preprocessing.resize import bilinear
from keras_paligemma.preprocessing.resize import bilinear_antialias
from keras_paligemma.preprocessing.resize import resample

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pp.npz"


@pytest.mark.parametrize("size", [28, 56])
@pytest.mark.parametrize("name", ["down", "up", "near"])
def test_pixels_equal_those_of_the_original(name, size):
    golden = np.load(GOLDEN)
    image = golden[f"image/{name}/in"]
    for resize, antialias in ((bilinear, False), (bilinear_antialias, True)):
        np.testing.assert_array_equal(
            resize(image, (size, size)),
            golden[f"image/{name}/{size}/antialias_{antialias}"],
        )


@pytest.mark.parametrize("size", [(28, 28), (5, 90), (90, 5)])
def test_pixels_equal_those_of_tensorflow(size):
    tf = pytest.importorskip("tensorflow")
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), "uint8")
    image[:20] = 255  # Flat areas show rounding of weight sums.
    for resize, antialias in ((bilinear, False), (bilinear_antialias, True)):
        expected = tf.image.resize(image, size, antialias=antialias)
        np.testing.assert_array_equal(
            resize(image, size), tf.cast(expected, "uint8")
        )
    np.testing.assert_array_equal(resample(image, size), expected)


def test_bicubic_is_a_weighted_sum_with_antialias():
    # Pillow's filter is a cubic with a = -0.5, stretched by the downscaling
    # factor. Here it is computed in float64, without rounding between the two
    # axes.
    image = np.random.default_rng(0).integers(60, 200, (12, 9, 3), "uint8")

    def weights(source, target):
        scale = source / target
        stretch = max(scale, 1)
        centre = (np.arange(target)[:, None] + 0.5) * scale
        x = abs((np.arange(source) + 0.5 - centre) / stretch)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        values = np.where(x < 1, near, np.where(x < 2, far, 0))
        return values / values.sum(1, keepdims=True)

    expected = np.einsum(
        "yh,xw,hwc->yxc", weights(12, 5), weights(9, 20), image
    )
    received = bicubic(image, (5, 20))
    assert received.dtype == np.uint8
    assert abs(received - expected).max() < 1.01


def test_bicubic_equals_transformers():
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "SiglipImageProcessorPil", None)
    if processor is None:
        pytest.skip("transformers has no Pillow image processor")
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), "uint8")
    expected = processor(size={"height": 28, "width": 28}, resample=3)(
        Image.fromarray(image), return_tensors="np"
    )["pixel_values"][0]
    received = bicubic(image, (28, 28)) / 127.5 - 1
    np.testing.assert_allclose(received.transpose(2, 0, 1), expected, atol=1e-6)


@pytest.mark.parametrize("resize", [bilinear, bilinear_antialias, bicubic])
def test_size_is_height_then_width(resize):
    image = np.zeros((40, 30, 3), "uint8")
    image[:20] = 200
    resized = resize(image, (8, 4))
    assert resized.shape == (8, 4, 3)
    expected = np.where(np.arange(8)[:, None, None] < 4, 200, 0)
    assert abs(resized - expected).max() < 30  # Antialiasing blurs the edge.


@pytest.mark.parametrize("resize", [bilinear, bilinear_antialias, bicubic])
def test_same_size_changes_nothing(resize):
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), "uint8")
    np.testing.assert_array_equal(resize(image, (7, 5)), image)
