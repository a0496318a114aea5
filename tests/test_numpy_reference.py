"""The NumPy reference compared with numbers of the original implementation."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.numpy_reference import attention_mask
from tests.helpers.numpy_reference import encode_images
from tests.helpers.numpy_reference import forward
from tests.helpers.numpy_reference import load_arrays

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {
    "query_scale": 24**-0.5,
    "attention_soft_cap": 50.0,
    "final_soft_cap": 30.0,
    "embedding_scale": 64**0.5,
    "rope_base": 10_000.0,
}
IMAGE_TOKENS = 9


@pytest.fixture(scope="module")
def arrays():
    return load_arrays(GOLDEN / "tiny_headdim.npz")


@pytest.fixture(scope="module")
def golden():
    return load_arrays(GOLDEN / "tiny_headdim.expected.npz")


def assert_near(actual, expected, tolerance=2e-5):
    """Compare with a tolerance relative to the largest expected value."""
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < tolerance


def training_inputs(golden):
    token_ids = golden["in/train/text"][:, :-1]
    return {
        "token_ids": token_ids,
        # In training, the original has no padding mask. Tokens after the answer
        # are attended to like the answer itself.
        "padding_mask": np.ones_like(token_ids, bool),
        "response_mask": golden["in/train/mask_ar"][:, :-1],
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("file", "precision"),
    [("tiny_headdim.npz", "f32"), ("tiny_headdim.b16.npz", "bf16")],
)
def test_training_forward(golden, file, precision, dtype):
    outputs = forward(
        load_arrays(GOLDEN / file),
        SETTINGS,
        golden["in/image"][:4],
        **training_inputs(golden),
        dtype=dtype,
    )
    assert all(output.dtype == dtype for output in outputs.values())
    named = {
        "img/zimg": outputs["image_embeddings"],
        "llm/pre_logits": outputs["hidden_states"],
        "llm/logits": outputs["capped_logits"],
        "text_logits": outputs["logits"][:, IMAGE_TOKENS:],
    }
    compared = [name for name in named if f"{precision}/{name}" in golden]
    assert {"img/zimg", "llm/pre_logits", "text_logits"} <= set(compared)
    for name in compared:
        assert_near(named[name], golden[f"{precision}/{name}"])


def test_video_forward(arrays, golden):
    inputs = training_inputs(golden)
    outputs = forward(
        arrays,
        SETTINGS,
        golden["in/video"],
        **{name: array[:2] for name, array in inputs.items()},
    )
    assert_near(outputs["image_embeddings"], golden["f32/video/zimg"])
    text_logits = outputs["logits"][:, 2 * IMAGE_TOKENS :]
    assert_near(text_logits, golden["f32/video/text_logits"])


def test_frames_are_encoded_one_by_one(arrays, golden):
    video = golden["in/video"].astype(np.float64)
    stripped = {k.removeprefix("params/"): v for k, v in arrays.items()}
    frames = [encode_images(stripped, video[:, i]) for i in range(2)]
    both = encode_images(stripped, video)
    np.testing.assert_array_equal(both, np.concatenate(frames, axis=1))


@pytest.mark.parametrize("align", ["left", "right"])
def test_padded_prompts(arrays, golden, align):
    """Positions skip padding, so its place does not matter."""
    # The last row is batch padding.
    names = ("text", "mask_input", "mask_ar")
    text, valid, causal = (golden[f"in/eval/{name}"][:4] for name in names)
    if align == "right":
        order = np.argsort(valid, axis=1, kind="stable")
        text, valid, causal = (
            np.take_along_axis(array, order, axis=1)
            for array in (text, valid, causal)
        )
        # Otherwise, the padding in front would separate image and prompt.
        causal = causal * valid
    outputs = forward(
        arrays, SETTINGS, golden["in/image"][:4], text, valid, causal
    )
    last = IMAGE_TOKENS + (np.arange(text.shape[1]) * valid).argmax(axis=1)
    actual = outputs["logits"][np.arange(4), last]
    assert_near(actual, golden["f32/cache_f32/prefill_logits"][:4])


def test_attention_mask(golden):
    cases = load_arrays(GOLDEN / "masks_schedules.npz")
    for i in range(3):
        np.testing.assert_array_equal(
            attention_mask(cases[f"{i}/mask_ar"], cases[f"{i}/input_mask"]),
            cases[f"{i}/attn_mask"],
        )
    image_part = ((0, 0), (IMAGE_TOKENS, 0))
    causal = np.pad(golden["in/train/mask_ar"][:, :-1], image_part)
    np.testing.assert_array_equal(
        attention_mask(causal, np.ones_like(causal, bool)),
        golden["f32/attn_mask"],
    )
    causal = np.pad(golden["in/eval/mask_ar"], image_part)
    valid = np.pad(
        golden["in/eval/mask_input"] > 0, image_part, constant_values=True
    )
    np.testing.assert_array_equal(
        attention_mask(causal, valid), golden["f32/eval_attn_mask"]
    )


def test_without_post_norms_and_soft_caps(arrays, golden):
    """In PaliGemma 1, every optional part is off, which changes the result."""
    no_caps = {"attention_soft_cap": None, "final_soft_cap": None}
    inputs = (golden["in/image"][:4],)
    reference = forward(arrays, SETTINGS, *inputs, **training_inputs(golden))
    bare = {k: v for k, v in arrays.items() if "/post_" not in k}
    assert len(arrays) - len(bare) == 2
    for arguments in [(bare, SETTINGS), (arrays, SETTINGS | no_caps)]:
        outputs = forward(*arguments, *inputs, **training_inputs(golden))
        assert np.isfinite(outputs["logits"]).all()
        moved = np.abs(outputs["logits"] - reference["logits"]).max()
        assert moved > 1e-3
    np.testing.assert_array_equal(outputs["logits"], outputs["capped_logits"])
