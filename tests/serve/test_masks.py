"""Masks come from the codec of the model, or there are none."""

import base64

import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.requests import Answered
from keras_paligemma.tasks.mask_codec import MaskCodec
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.serve.plain_model import PlainModel

pytestmark = pytest.mark.any_backend

IMAGE = base64.b64encode(encode(picture(), "PNG")).decode()


class Segments(PlainModel):
    """A model of some width that segments one cat."""

    def __init__(self, hidden_dim):
        super().__init__()
        self.hidden_dim = hidden_dim

    def answer(self, requests, tell):
        tokens = (*["<loc0000>"] * 2, *["<loc1023>"] * 2)
        tokens += (*(f"<seg{n:03}>" for n in range(16)), " cat", "")
        values = (-0.5,) * len(tokens)
        ids = (7,) * len(tokens)
        return [Answered("".join(tokens), tokens, ids, values, "stop")]


@pytest.mark.parametrize(
    ("hidden_dim", "codec", "masks"),
    [
        (None, None, True),  # A SavedModel.
        (64, None, True),
        (2304, None, False),
        (2304, MaskCodec.embedded(), True),
    ],
)
def test_masks_are_decoded_by_the_codec_of_the_model(hidden_dim, codec, masks):
    """That of the nano preset would make other masks of published codes."""
    app = make_app(Segments(hidden_dim), "segments", codec=codec)
    asked = {"image": IMAGE, "labels": "cat"}
    with TestClient(app) as client:
        found = client.post("/segment", json=asked)
        assert client.post("/detect", json=asked).status_code == 200
        asked = {"image": IMAGE, "prompt": "segment cat"}
        answer = client.post("/answer", json=asked).json()
    [box] = answer["boxes"]
    assert ("mask" in box) == masks
    assert found.status_code == (200 if masks else 400)
    if masks:
        assert found.json()["boxes"] == [box]
    else:
        assert "--codec gs://big_vision/" in found.json()["error"]
        assert "no codec" in answer["skipped"][0]["reason"]
