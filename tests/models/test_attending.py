"""Attention to the picture compared with a NumPy softmax, and its drawing."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.tasks.picture_attention import PictureAttention
from tests.helpers.numpy_reference import forward
from tests.helpers.numpy_reference import load_arrays
from tests.helpers.numpy_reference import settings_of
from tests.helpers.tiny_models import FORMS_OF_BACKEND


def reference(model, examples, folder):
    """Return the attention weights of predicting positions, by NumPy.

    The shape is (B, R, layers, heads, L).
    """
    model.export_to_big_vision(folder / "model.npz")
    x, *_ = model.preprocessor(examples)
    found = forward(
        load_arrays(folder / "model.npz"),
        settings_of(model.backbone.text_config),
        **x,
    )
    responses = model.preprocessor.response_length
    weights = found["attention"][:, :, :, -responses - 1 : -1]
    return np.transpose(weights, (1, 3, 0, 2, 4))


@pytest.mark.parametrize("form", FORMS_OF_BACKEND)
def test_shares_are_the_softmaxs(tiny_model, examples, tmp_path, form):
    model = tiny_model(form=form)
    wanted = reference(model, examples, tmp_path)
    each = model.attention(examples, average=())
    for row, weights in enumerate(each):
        assert weights.text == examples["responses"][row]
        assert weights.tokens[-1] == ""
        count = len(weights.tokens)
        assert weights.shares.shape == (count, 2, 4, 3, 3)
        pictures = wanted[row, :count, :, :, :9].reshape(weights.shares.shape)
        np.testing.assert_allclose(weights.shares, pictures, atol=1e-6)
        # The rest of the weights attends to text.
        assert weights.shares.sum(axis=(-1, -2)).max() < 1
    for average, axes in (("layers", 1), (("heads",), 2), (None, (1, 2))):
        options = {} if average is None else {"average": average}
        found = model.attention(examples, batch_size=3, **options)
        for weights, both in zip(found, each, strict=True):
            np.testing.assert_allclose(
                weights.shares, both.shares.mean(axis=axes), atol=1e-6
            )
    single = {key: value[2] for key, value in examples.items()}
    one = model.attention(single)
    np.testing.assert_allclose(one.shares, found[2].shares, atol=1e-6)
    assert not one.shares.flags.writeable
    single["image_embeddings"] = model.encode(single.pop("images"))
    np.testing.assert_allclose(
        model.attention(single).shares, one.shares, atol=1e-6
    )


def test_several_pictures_of_an_example(tiny_model, examples, tmp_path):
    model = tiny_model()
    examples["images"] = [examples["images"][k : k + 2] for k in (0, 1, 2, 1)]
    wanted = reference(model, examples, tmp_path).mean(axis=(2, 3))
    for row, weights in enumerate(model.attention(examples)):
        count = len(weights.tokens)
        assert weights.shares.shape == (count, 2, 3, 3)
        pictures = wanted[row, :count, :18].reshape(weights.shares.shape)
        np.testing.assert_allclose(weights.shares, pictures, atol=1e-6)
    with pytest.raises(ValueError, match="one picture.*draw_attention"):
        weights.overlay()


def test_words_are_means_of_their_tokens():
    shares = np.arange(5 * 4, dtype="float32").reshape(5, 2, 2)
    found = PictureAttention(("a c", "at", " a", " cat", ""), shares)
    assert found.text == "a cat a cat"
    np.testing.assert_array_equal(found.word("cat"), shares[:2].mean(0))
    np.testing.assert_array_equal(found.word("cat", 1), shares[3])
    np.testing.assert_array_equal(found.word("t a"), shares[1:3].mean(0))
    for word, number in (("dog", 0), ("cat", 2), ("cat", -1), ("", 0)):
        with pytest.raises(ValueError, match="no such word.*'a cat a cat'"):
            found.word(word, number)


def test_a_character_of_several_tokens_is_in_its_word_everywhere():
    shares = np.arange(8 * 4, dtype="float32").reshape(8, 2, 2)
    tokens = ("猫", "", "", " a", "猫", "", "", "")
    found = PictureAttention(tokens, shares)
    np.testing.assert_array_equal(found.word("猫"), shares[:3].mean(0))
    np.testing.assert_array_equal(found.word("猫 a"), shares[:4].mean(0))
    np.testing.assert_array_equal(found.word(" a"), shares[3])
    # The last token, which ends the response, is in no word.
    np.testing.assert_array_equal(found.word("猫", 1), shares[4:7].mean(0))


def test_overlays_are_bright_where_attention_is():
    picture = np.full((448, 896, 3), 200, "uint8")
    shares = np.zeros((2, 2, 2), "float32")
    shares[1, 0, 1] = 0.01
    found = PictureAttention(("a", " cat"), shares, picture)
    drawn = found.overlay("cat")
    assert (drawn.mode, drawn.size) == ("RGB", (896, 448))
    assert drawn.getpixel((890, 4)) == (200, 200, 200)
    assert drawn.getpixel((4, 440)) == (40, 40, 40)
    # A word without attention to the picture is dark, without a division by 0.
    assert np.unique(np.asarray(found.overlay("a"))).tolist() == [40]
    np.testing.assert_array_equal(found.overlay(), drawn)
    assert found.overlay().size == Image.fromarray(picture).size
    with pytest.raises(ValueError, match="picture NoneType"):
        PictureAttention(("a",), shares[:1]).overlay()


def test_what_has_no_attention_is_refused(tiny_model, examples):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"'layers', 'heads'.*\('rows',\)"):
        model.attention(examples, average="rows")
    with pytest.raises(ValueError, match="Without a picture"):
        model.attention(examples | {"images": None})
    with pytest.raises(ValueError, match="Training needs the answers"):
        model.attention({key: examples[key] for key in ("images", "prompts")})
    with pytest.raises(ValueError, match="without a preprocessor"):
        PaliGemmaCausalLM(model.backbone).attention(examples)
