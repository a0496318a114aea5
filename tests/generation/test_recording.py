"""Programs that run again give the same answers, with the current weights."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.helpers.tiny_models import randomize_adapters


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def asked(examples):
    return {key: examples[key] for key in ("images", "prompts")}


def log_probabilities(model, asked, **options):
    """Return the tokens of each answer and their log-probabilities."""
    answers = model.generate(
        asked, stop_token_ids=None, details=True, **options
    )
    numbers = [answer.log_probabilities for answer in answers]
    return [answer.token_ids for answer in answers], np.array(numbers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.5, "top_k": 9, "seed": 3},
        {"beams": 2},
        {"alternatives": 2},
    ],
)
def test_later_runs_answer_as_the_first(model, asked, options):
    wanted, numbers = log_probabilities(model, asked, **options)
    for _ in range(2):
        found, again = log_probabilities(model, asked, **options)
        assert found == wanted
        np.testing.assert_allclose(again, numbers, rtol=0, atol=1e-6)


def test_later_runs_follow_the_weights(model, asked):
    for _ in range(3):
        _, before = log_probabilities(model, asked)
    table = model.backbone.token_embedding.table
    kept = ops.convert_to_numpy(table).copy()
    try:
        table.assign(kept[:, ::-1])
        _, found = log_probabilities(model, asked)
        model.generate_function = None
        _, wanted = log_probabilities(model, asked)
    finally:
        table.assign(kept)
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_later_runs_do_not_mind_what_is_trainable(tiny_model, asked):
    """Kernels have the same shape, and another one is frozen each time."""
    model = tiny_model(form="unrolled")
    [block, *_] = model.backbone.text_decoder.blocks.each_block()
    key, value = (
        layer.kernel for layer in (block.attention.key, block.attention.value)
    )
    assert key.shape == value.shape
    numbers = []
    for frozen in (key, key, value):
        key.trainable = value.trainable = True
        frozen.trainable = False
        numbers.append(log_probabilities(model, asked)[1])
    np.testing.assert_allclose(numbers[2], numbers[0], rtol=0, atol=1e-6)


def test_later_runs_follow_the_adapter(tiny_model, asked):
    model = tiny_model()
    for seed, name in enumerate(("one", "two")):
        model.enable_lora(2, name=name)
        randomize_adapters(model.backbone, seed)
    found = {}
    for name in ("one", "two") * 3:
        model.adapters.select(name)
        found.setdefault(name, []).append(log_probabilities(model, asked)[1])
    for first, *later in found.values():
        for numbers in later:
            np.testing.assert_allclose(numbers, first, rtol=0, atol=1e-6)
    assert np.abs(found["one"][2] - found["two"][2]).max() > 1e-3


def test_a_hook_is_called_at_each_token(model, asked):
    if keras.backend.backend() != "torch":
        pytest.skip("compiled: hooks are called once, while tracing")
    places = []

    def hook(logits_BV, state):
        places.append(int(state.position))
        return logits_BV

    for _ in range(2):
        model.generate(
            asked, max_new_tokens=3, stop_token_ids=None, logits_hook=hook
        )
    assert places == [0, 1, 2] * 2
