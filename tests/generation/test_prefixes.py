"""One prefix with many continuations: same results, prefix never modified."""

import dataclasses

import keras
import numpy as np
import pytest

from tests.helpers.tiny_models import FORMS_OF_BACKEND


@pytest.fixture(scope="module", params=FORMS_OF_BACKEND)
def model(tiny_model, request):
    return tiny_model(form=request.param)


@pytest.fixture
def asked(examples):
    return {key: examples[key] for key in ("images", "prompts")}


def arrays_of(prefix):
    return [
        keras.ops.convert_to_numpy(array).copy()
        for array in keras.tree.flatten(prefix.arrays())
    ]


def assert_same(found, wanted):
    assert [result.token_ids for result in found] == [
        result.token_ids for result in wanted
    ]
    for result, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(
            result.log_probabilities, other.log_probabilities, atol=1e-5
        )


def test_a_prefix_is_continued_again_and_again(model, asked):
    prefix = model.prefill(asked)
    before = arrays_of(prefix)
    given = {"prefix": prefix}
    options = {"details": True, "stop_token_ids": None}
    wanted = model.generate(asked, **options)
    for _ in range(2):
        assert_same(model.generate(given, **options), wanted)
    assert_same(model.generate(given, batch_size=3, **options), wanted)
    texts = [""] * 4
    for pieces in model.stream(given, chunk=2):
        texts = [a + b for a, b in zip(texts, pieces, strict=True)]
    assert texts == model.generate(asked)
    for options in (
        {"beams": 2},
        {"temperature": 2.0, "seed": 3},
        {"strip_prompt": False},
        {"stop_strings": "e", "max_new_tokens": 5},
    ):
        assert model.generate(given, **options) == model.generate(
            asked, **options
        )
    for found, old in zip(arrays_of(prefix), before, strict=True):
        np.testing.assert_array_equal(found, old)


def test_one_prefix_and_many_responses(model, asked, examples):
    one = {key: value[1] for key, value in asked.items()}
    prefix = model.prefill(one)
    assert len(prefix) == 1 and prefix.prompts == ("detect cat",)
    responses = examples["responses"][:3]
    whole = {key: [value] * 3 for key, value in one.items()}
    whole["responses"] = responses
    given = {"prefix": prefix, "responses": responses}
    wanted = model.score(whole, details=True)
    assert_same(model.score(given, details=True), wanted)
    assert_same(model.score(given, details=True, batch_size=2), wanted)
    single = model.score({"prefix": prefix, "responses": responses[0]})
    assert single == pytest.approx(wanted[0].log_probability, abs=1e-4)
    # Answers with begun responses, a single answer, and several samples.
    options = {"details": True, "stop_token_ids": None}
    begun = model.generate(whole, **options)
    assert_same(model.generate(given, **options), begun)
    alone = model.generate(one, **options)
    assert_same([model.generate({"prefix": prefix}, **options)], [alone])
    drawn = {"num_samples": 3, "temperature": 2.0, "seed": 1}
    assert model.generate({"prefix": prefix}, **drawn) == model.generate(
        one, **drawn
    )


def test_hidden_states_behind_a_prefix(model, asked, examples):
    prefix = model.prefill(asked)
    responses = examples["responses"]
    found = model.embed({"prefix": prefix, "responses": responses})
    x = model.preprocessor.generate_preprocess(asked | {"responses": responses})
    wanted = keras.ops.convert_to_numpy(model.backbone(x))
    real = x["response_mask"][:, -8:]
    np.testing.assert_array_equal(found["padding_mask"], real)
    np.testing.assert_allclose(
        found["hidden_states"][real], wanted[:, -8:][real], atol=1e-4
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(prefix.last_hidden_states),
        wanted[:, -9],
        atol=1e-4,
    )


def test_keys_and_values_are_those_of_every_layer(model, asked):
    """A policy receives a layer's own projected keys and values."""
    prefix = model.prefill(asked)
    assert prefix.num_layers == 2
    tokens = 9 + model.preprocessor.prompt_length
    assert prefix.padding_mask.shape == prefix.positions.shape == (4, tokens)
    x = model.preprocessor.generate_preprocess(asked)
    rows = {
        "images": x["images"],
        "token_ids": x["token_ids"][:, :12],
        "padding_mask": x["padding_mask"][:, :12],
    }
    backbone = model.backbone
    weights = backbone.weights_by_name()
    scale = weights["text_decoder/blocks/pre_attention_norm/scale"].read()[0]
    kernel = weights["text_decoder/blocks/attention/value/kernel"].read()[0]
    x_BTD = keras.ops.convert_to_numpy(backbone.embed(rows))
    x_BTD = x_BTD / np.sqrt(np.square(x_BTD).mean(-1, keepdims=True) + 1e-6)
    wanted = np.tensordot(x_BTD * (1 + scale), kernel, 1)
    for number in range(2):
        keys, values = prefix.layer(number)
        assert keys.shape == values.shape == (4, tokens, 2, 24)
    found = keras.ops.convert_to_numpy(prefix.layer(0)[1])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_prefixes_of_any_kind(model, asked):
    embeddings = model.encode(asked["images"])
    frames = [asked["images"][k : k + 2] for k in (0, 1, 2, 1)]
    for images in (
        {"images": None},
        {"images": frames},
        {"image_embeddings": embeddings},
    ):
        inputs = images | {"prompts": asked["prompts"]}
        found = model.generate({"prefix": model.prefill(inputs)})
        assert found == model.generate(inputs)
        assert found == model.generate(inputs, batch_size=3)
    one = {"image_embeddings": embeddings[0], "prompts": asked["prompts"]}
    assert model.generate(one, batch_size=3) == model.generate(one)


def test_what_continues_no_prefix(model, asked, examples):
    prefix = model.prefill(asked)
    with pytest.raises(ValueError, match="one response a prompt, 4.*2 resp"):
        model.score({"prefix": prefix, "responses": ["a", "b"]})
    with pytest.raises(ValueError, match="alone or with 'responses'.*prompts"):
        model.generate({"prefix": prefix, "prompts": "caption en"})
    with pytest.raises(ValueError, match="a prefix of type ndarray"):
        model.generate({"prefix": np.zeros(3)})
    with pytest.raises(ValueError, match="ends with the prompt"):
        model.prefill(examples)
    with pytest.raises(ValueError, match="those of responses"):
        model.embed({"prefix": prefix})


def test_a_prefix_is_of_a_model_of_the_same_sizes(model, asked):
    prefix = model.prefill(asked)
    narrow = dataclasses.replace(
        prefix, last_hidden_states=prefix.last_hidden_states[:, :32]
    )
    keys, values = prefix.layer(0)
    other = [(keys, values)] * 2
    if isinstance(prefix.cache, list):
        stack = keras.ops.stack
        other = tuple(stack([each, each], axis=1) for each in (keys, values))
    form = dataclasses.replace(prefix, cache=other)
    for wrong, name in ((narrow, "'hidden_dim': 32"), (form, "'scanned'")):
        with pytest.raises(ValueError, match=f"of another model.*{name}"):
            model.generate({"prefix": wrong})
        with pytest.raises(ValueError, match=f"of another model.*{name}"):
            model.score({"prefix": wrong, "responses": ["a"] * 4})
