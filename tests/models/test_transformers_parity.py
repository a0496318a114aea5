"""`transformers` compared with the NumPy reference; weight conversion."""

import numpy as np
import pytest

from tests.helpers.numpy_reference import forward
from tests.helpers.transformers_reference import numpy_settings
from tests.helpers.transformers_reference import run
from tests.helpers.transformers_reference import tiny_transformers_model
from tests.helpers.transformers_reference import transformers_to_big_vision

PROMPT_LENGTHS, PROMPT_SPACE = (5, 2, 4), 5
RESPONSE_LENGTHS, RESPONSE_SPACE = (1, 4, 0), 4


@pytest.fixture
def inputs():
    """Return rows whose responses begin at one index, padded on both sides."""
    random = np.random.default_rng(0)
    index = np.arange(PROMPT_SPACE + RESPONSE_SPACE)
    start = PROMPT_SPACE - np.array(PROMPT_LENGTHS)[:, None]
    end = PROMPT_SPACE + np.array(RESPONSE_LENGTHS)[:, None]
    padding_mask = (start <= index) & (index < end)
    return {
        "token_ids": random.integers(1, 101, padding_mask.shape) * padding_mask,
        "padding_mask": padding_mask,
        "response_mask": padding_mask & (index >= PROMPT_SPACE),
    }


def random_images(frames):
    shape = (len(PROMPT_LENGTHS), *frames, 21, 21, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def relative_error(actual, expected, padding_mask):
    image_tokens = expected.shape[1] - padding_mask.shape[1]
    valid = np.pad(
        padding_mask, ((0, 0), (image_tokens, 0)), constant_values=True
    )
    error = np.abs(actual - expected)[valid].max()
    return error / np.abs(expected[valid]).max()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("frames", [(), (2,)], ids=["image", "frames"])
def test_logits_equal(inputs, version, frames):
    model = tiny_transformers_model(seed=0, version=version)
    images = random_images(frames)
    expected = run(model, images, **inputs)
    arrays = transformers_to_big_vision(model.state_dict(), model.config)
    settings = numpy_settings(model.config)
    outputs = forward(arrays, settings, images, **inputs)
    error = relative_error(
        outputs["capped_logits"], expected, inputs["padding_mask"]
    )
    assert error < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"query_scale": 10**-0.5},
        {"attention_soft_cap": None},
        {"final_soft_cap": None},
        {"embedding_scale": 1.0},
        {"rope_base": 1_000.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_is_felt(inputs, change):
    """Each setting changes the outputs; otherwise agreement proves nothing."""
    model = tiny_transformers_model(seed=0)
    arrays = transformers_to_big_vision(model.state_dict(), model.config)
    settings = numpy_settings(model.config) | change
    images = random_images(())
    outputs = forward(arrays, settings, images, **inputs)
    error = relative_error(
        outputs["capped_logits"],
        run(model, images, **inputs),
        inputs["padding_mask"],
    )
    assert error > 1e-3


def test_conversion_takes_every_weight():
    model = tiny_transformers_model(seed=0)
    arrays = transformers_to_big_vision(model.state_dict(), model.config)
    # `parameters` counts the head once, since it is tied to the embedding.
    assert sum(array.size for array in arrays.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
