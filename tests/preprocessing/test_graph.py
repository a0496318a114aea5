"""The preprocessor as a function of `tf.data`."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.helpers.tiny_models import GOLDEN

tf = pytest.importorskip("tensorflow")

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 31, 3), "uint8")
TEXTS = {
    "prompts": ["caption en", "detect cat", "a", "two\nlines"],
    "responses": ["a dog", "<loc0010><loc0200> cat", "Größe 東", "42"],
}
WEIGHTS = np.array([1, 0.5, 2, 0], "float32")


@pytest.fixture(scope="module")
def preprocessor():
    return PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(GOLDEN / "toy_sp.model"),
        PaliGemmaImageConverter(28),
        prompt_length=12,
        response_length=28,
    )


def pictures(kind, folder):
    if kind == "files":
        Image.fromarray(PICTURE).save(folder / "a.png")
        return [(folder / "a.png").read_bytes()] * 4
    if kind == "frames":
        return np.stack([[PICTURE, PICTURE[::-1]]] * 4)
    return np.stack([PICTURE] * 4)


def assert_equal(found, wanted):
    for array, other in zip(
        tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True
    ):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("kind", ["arrays", "files", "frames"])
def test_maps_batches_and_examples(preprocessor, kind, tmp_path):
    columns = TEXTS | {"images": pictures(kind, tmp_path)}
    wanted = preprocessor(columns, sample_weight=WEIGHTS)
    data = tf.data.Dataset.from_tensor_slices((columns, WEIGHTS))

    def preprocess(x, weights):
        return preprocessor(x, sample_weight=weights)

    for mapped in (
        data.batch(4).map(preprocess),
        data.map(preprocess).batch(4),
        # Preprocessed data is returned unchanged.
        data.batch(4).map(preprocess).map(preprocessor),
    ):
        (found,) = mapped.as_numpy_iterator()
        assert_equal(found, wanted)
        x, y, weights = mapped.element_spec
        frames = (2,) if kind == "frames" else ()
        assert x["images"].shape[1:] == (*frames, 28, 28, 3)
        assert x["token_ids"].shape[1:] == (40,)
        assert y.shape[1:] == weights.shape[1:] == (28,)


def test_the_preprocessor_itself_is_the_function(preprocessor):
    columns = TEXTS | {"images": pictures("arrays", None)}
    data = tf.data.Dataset.from_tensor_slices(columns).batch(4)
    (found,) = data.map(preprocessor).as_numpy_iterator()
    assert_equal(found, preprocessor(columns))
    (found,) = data.map(
        lambda x: preprocessor(x, sequence_length=38)
    ).as_numpy_iterator()
    assert_equal(found, preprocessor(columns, sequence_length=38))


def test_text_alone(preprocessor):
    alone = PaliGemmaCausalLMPreprocessor(preprocessor.tokenizer)
    data = tf.data.Dataset.from_tensor_slices(TEXTS).batch(4)
    (found,) = data.map(alone).as_numpy_iterator()
    assert_equal(found, alone(TEXTS))


def test_errors(preprocessor):
    data = tf.data.Dataset.from_tensor_slices(TEXTS)
    with pytest.raises(ValueError, match="prompts of a known rank"):
        data.map(lambda x: preprocessor({"responses": x["responses"]}))
    with pytest.raises(ValueError, match="Targets are made from"):
        data.map(lambda x: preprocessor(x, x["prompts"]))
    # The error shows the line to write when another function is mapped.
    line = r"`dataset.map\(lambda x: tf.numpy_function\("
    with pytest.raises(ValueError, match=line):
        data.map(preprocessor.generate_preprocess)
    with pytest.raises(ValueError, match=line):
        data.map(lambda x: preprocessor.tokenizer.tokenize(x["prompts"]))
    with pytest.raises(tf.errors.OpError, match="go together"):
        list(data.map(preprocessor))


def test_maps_grey_pictures_and_embeddings(preprocessor):
    grey = TEXTS | {"images": np.stack([PICTURE[..., 0]] * 4)}
    wanted = preprocessor(
        TEXTS | {"images": [picture for picture in grey["images"]]}
    )
    mapped = tf.data.Dataset.from_tensor_slices(grey).map(preprocessor)
    assert_equal(next(iter(mapped.batch(4))), wanted)
    seen = TEXTS | {"image_embeddings": np.ones((4, 4, 8), "float32")}
    data = tf.data.Dataset.from_tensor_slices(seen)
    for mapped in (
        data.map(preprocessor).batch(4),
        data.batch(4).map(preprocessor),
    ):
        assert_equal(next(iter(mapped)), preprocessor(seen))


def test_pictures_of_unknown_rank_are_an_error(preprocessor, tmp_path):
    columns = TEXTS | {"images": pictures("files", tmp_path)}
    data = tf.data.Dataset.from_tensor_slices(columns)

    def decoded(x):
        return preprocessor(x | {"images": tf.io.decode_image(x["images"])})

    with pytest.raises(ValueError, match="expand_animations=False"):
        data.map(decoded)
