"""Scores, embeddings, pictures encoded once, and text alone."""

import copy

import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaCausalLM


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def test_scores_are_what_the_loss_is(model, examples):
    scores = model.score(examples)
    # One example at a time, since the loss is a mean of means.
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in examples.items()}
        loss = model.evaluate(one, verbose=0, return_dict=True)["loss"]
        [answer] = model.score(one, details=True)
        assert answer.token_ids[-1] == 1
        assert answer.text == examples["responses"][row]
        assert answer.mean_log_probability == pytest.approx(-loss, rel=0.02)
        assert scores[row] == pytest.approx(answer.log_probability, rel=1e-4)
    np.testing.assert_allclose(
        model.score(examples, batch_size=3), scores, rtol=1e-5
    )
    single = {key: value[0] for key, value in examples.items()}
    assert model.score(single) == pytest.approx(scores[0], rel=1e-5)


def test_a_response_that_is_cut_has_no_end(model, examples):
    long = examples | {"responses": ["yes please " * 40, "no", "no", "no"]}
    with pytest.warns(UserWarning, match="1 of 4 responses do not fit"):
        answers = model.score(long, details=True)
    finishes = [answer.finish for answer in answers]
    assert finishes == ["length", *["stop_token"] * 3]


def test_nothing_to_encode_is_an_error(model, examples):
    with pytest.raises(ValueError, match="Received: none"):
        model.encode([])
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="`batch_size`.*Received: "):
            model.encode(examples["images"], batch_size=size)


def test_a_preprocessor_of_text_alone_encodes_nothing(model, examples):
    preprocessor = copy.copy(model.preprocessor)
    preprocessor.image_converter = None
    other = PaliGemmaCausalLM(model.backbone, preprocessor)
    with pytest.raises(ValueError, match="reads no pictures. Received"):
        other.encode(examples["images"])


def test_scores_are_log_probabilities_of_answers(model, examples):
    """The answer ends as in `score`: with eos as its last token."""
    asked = {key: examples[key] for key in ("images", "prompts")}
    wanted = [*model.preprocessor.tokenizer.tokenize("a cat"), 1]

    def forced(logits_BV, state):
        token = ops.take(np.array(wanted, "int32"), state.position)
        ids_V = ops.arange(logits_BV.shape[1], dtype="int32")
        return ops.where(ids_V == token, logits_BV, -1e30)

    answers = model.generate(asked, details=True, logits_hook=forced)
    assert [list(answer.token_ids) for answer in answers] == [wanted] * 4
    texts = [answer.text for answer in answers]
    scored = model.score(asked | {"responses": texts}, details=True)
    for answer, two in zip(answers, scored, strict=True):
        assert answer.token_ids == two.token_ids
        np.testing.assert_allclose(
            answer.log_probabilities, two.log_probabilities, atol=1e-5
        )


def test_a_picture_is_encoded_once(model, examples):
    picture = examples["images"][0]
    seen = model.encode(picture)
    assert seen.shape == (9, 64) and not seen.flags.writeable
    prompts = examples["prompts"]
    wanted = model.generate({"images": [picture] * 4, "prompts": prompts})
    found = model.generate({"image_embeddings": seen, "prompts": prompts})
    assert found == wanted
    each = model.encode(examples["images"], batch_size=3)
    assert each.shape == (4, 9, 64)
    np.testing.assert_allclose(each[0], seen, atol=1e-5)
    found = model.generate({"image_embeddings": each, "prompts": prompts})
    assert found == model.generate(
        {"images": examples["images"], "prompts": prompts}
    )


def test_text_alone(model, examples):
    alone = {"images": None, "prompts": examples["prompts"]}
    found = model.generate(alone)
    assert [isinstance(text, str) for text in found] == [True] * 4
    with pytest.raises(ValueError, match="'images': None.*Received: keys"):
        model.generate({"prompts": examples["prompts"]})


def test_embeddings(model, examples):
    asked = {key: examples[key] for key in ("images", "prompts")}
    found = model.embed(asked)
    assert found["hidden_states"].shape == (4, 9 + 12, 64)
    assert found["padding_mask"].sum(axis=1).min() > 9
    np.testing.assert_allclose(
        found["image_embeddings"], model.encode(examples["images"]), atol=1e-5
    )
    one = model.embed({key: value[2] for key, value in asked.items()})
    real = one["padding_mask"]
    np.testing.assert_allclose(
        one["hidden_states"][real], found["hidden_states"][2][real], atol=1e-4
    )


def test_embeddings_of_arrays(model, examples):
    """Their prompts end where they end, not at the model's own length."""
    asked = {key: examples[key] for key in ("images", "prompts")}
    longer = copy.copy(model.preprocessor)
    longer.prompt_length += 4
    arrays = longer.generate_preprocess(asked)
    wanted, found = model.embed(asked), model.embed(arrays)
    for name in ("hidden_states", "image_embeddings"):
        first, second = (
            each[name][each["padding_mask"]] if name[0] == "h" else each[name]
            for each in (wanted, found)
        )
        np.testing.assert_allclose(second, first, atol=1e-4)
    begun = longer.generate_preprocess(asked | {"responses": ["a"] * 4})
    with pytest.raises(ValueError, match="Received: arrays with a begun"):
        model.embed(begun)


@pytest.mark.parametrize("method", ["score", "encode", "embed", "stream"])
def test_what_reads_text_needs_a_preprocessor(model, method):
    with pytest.raises(ValueError, match="preprocessor.*Expected"):
        getattr(PaliGemmaCausalLM(model.backbone), method)({})


def test_embeddings_that_fit_no_prompt(model, examples):
    found = model.encode(examples["images"][:2])
    inputs = {"prompts": ["caption en"] * 3, "image_embeddings": found}
    for method in model.embed, model.prefill, model.generate:
        with pytest.raises(ValueError, match=r"Expected: shape \(3, "):
            method(inputs)
    both = {"prompts": ["ocr"] * 2, "image_embeddings": found}
    with pytest.raises(ValueError, match="Expected: one of them"):
        model.generate(both | {"images": examples["images"][:2]})
    with pytest.raises(ValueError, match="Received: 'responses'"):
        model.embed(both | {"responses": ["a"] * 2})


@pytest.mark.parametrize("method", ["score", "attention", "prefill"])
def test_arrays_where_text_is_read(model, examples, method):
    arrays = model.preprocessor.generate_preprocess(
        {key: examples[key] for key in ("images", "prompts")}
    )
    with pytest.raises(ValueError, match=f"`{method}` reads text"):
        getattr(model, method)(arrays)
