"""`keras_paligemma.serve` with a SavedModel's folder."""

from pathlib import Path

import pytest

pytest.importorskip("tensorflow_text")

from keras_paligemma.serve.requests import Choice  # noqa: E402
from keras_paligemma.serve.requests import Limits  # noqa: E402
from keras_paligemma.serve.requests import Refused  # noqa: E402
from keras_paligemma.serve.requests import Request  # noqa: E402
from keras_paligemma.serve.saved_model import SavedModel  # noqa: E402

ROOT = Path(__file__).parents[2]
SCENE = (ROOT / "examples" / "pictures" / "scene_0.png").read_bytes()


def test_a_batch_is_what_its_rows_are(bare):
    model = SavedModel(bare)
    choice = Choice(max_new_tokens=4)
    prompts = ("caption en", "detect cat", "word " * 100)
    requests = [
        Request(model.read(SCENE, prompt, choice, Limits()), choice)
        for prompt in prompts
    ]
    first, second, bad = model.answer(requests, None)
    assert isinstance(bad, Refused)
    assert (bad.status, len(first.token_ids)) == (400, 4)
    [alone] = model.answer(requests[1:2], None)
    assert second.text == alone.text
    assert second.finish == alone.finish
    assert "".join(second.tokens) == second.text
    # The same inputs with a batch axis, which other servers batch.
    batched = model.loaded.signatures["batched"]
    inputs = batched.structured_input_signature[1]
    assert {name: input.shape.rank for name, input in inputs.items()} == {
        "images": 1,
        "prompts": 1,
    }
    outputs = batched(
        images=model.tf.constant([SCENE] * 3),
        prompts=model.tf.constant(prompts),
    )
    choice = Choice()
    whole, *_ = model.answer([Request(requests[0].inputs, choice)], None)
    assert outputs["text"][0].numpy().decode() == whole.text
    assert b"does not fit" in outputs["error"][2].numpy()
