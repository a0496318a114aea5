"""The example server over HTTP, in its own process."""

import base64
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from keras_paligemma import PaliGemmaCausalLM
from tests.helpers.encoded_pictures import bomb
from tests.helpers.encoded_pictures import pictures
from tests.helpers.tiny_models import PRESETS

pytest.importorskip("tensorflow_text")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCENE = (ROOT / "examples" / "pictures" / "scene_0.png").read_bytes()


def send(url, body=None, **headers):
    """Return the status and JSON of a reply."""
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def ask(address, image=SCENE, prompt="caption en", **options):
    image = base64.b64encode(image).decode()
    fields = {"image": image, "prompt": prompt, **options}
    return send(f"{address}/answer", json.dumps(fields).encode())


def test_the_graph_is_small(bare):
    # The graph grows with layers and adapters, not with their widths.
    assert (bare / "saved_model.pb").stat().st_size < 4_000_000


def page(address):
    with urllib.request.urlopen(address) as reply:
        return reply.read()


def test_page(address):
    assert b"Drop a picture" in page(address)
    assert send(f"{address}/nothing")[0] == 404


def test_answers(address):
    status, caption = ask(address)
    assert status == 200
    assert caption["text"]
    assert len(caption["log_probabilities"]) > 1
    short = ask(address, max_new_tokens=2)[1]
    assert len(short["log_probabilities"]) == 2


def test_concurrent_answers_are_generates(address):
    files = [SCENE, *list(pictures().values())[:5]]
    prompts = ["caption en", "detect bell", "answer en how many snail?"] * 2
    model = PaliGemmaCausalLM.from_preset(PRESETS / "pali_gemma2_nano_112")
    wanted = model.generate({"images": files, "prompts": prompts})
    assert len(set(wanted)) > 3
    # The last file is invalid, so some requests fail.
    files, prompts = [*files, bomb()], [*prompts, "caption en"]
    alone = [
        ask(address, *request) for request in zip(files, prompts, strict=True)
    ]
    order = np.random.default_rng(0).integers(0, len(files), 24)
    assert len(files) - 1 in order
    with ThreadPoolExecutor(12) as pool:
        replies = list(
            pool.map(lambda n: ask(address, files[n], prompts[n]), order)
        )
    texts = [*wanted, None]
    assert [reply.get("text") for _, reply in replies] == [
        texts[n] for n in order
    ]
    assert replies == [alone[n] for n in order]


BAD = {
    "no json": (b"{", 400),
    "a list": (b"[]", 400),
    "nothing": (b"{}", 400),
    "no base64": (b'{"image": "%%%", "prompt": "a"}', 400),
    "a number": (b'{"image": 1, "prompt": "a"}', 400),
    "half a letter": (b'{"image": "", "prompt": "\\ud800"}', 400),
    "unknown": (b'{"image": "", "prompt": "a", "colour": 1}', 400),
    "no picture": (b'{"image": "aGVsbG8=", "prompt": "a"}', 422),
    "infinite": (b'{"image": "", "prompt": "a", "temperature": 1e999}', 422),
    "too many": (b'{"image": "", "prompt": "a", "max_new_tokens": 999}', 422),
    "zero": (b'{"image": "", "prompt": "a", "max_new_tokens": 0}', 422),
    "no adapters": (b'{"image": "", "prompt": "a", "adapter": "x"}', 400),
    "half a token": (
        b'{"image": "", "prompt": "a", "max_new_tokens": 1.5}',
        400,
    ),
    "far too many": (
        b'{"image": "", "prompt": "a", "max_new_tokens": 4294967301}',
        400,
    ),
    "yes": (b'{"image": "", "prompt": "a", "max_new_tokens": true}', 400),
    "several": (b'{"image": "", "prompt": "a", "temperature": [1, 2]}', 400),
    "an adapter of 1": (b'{"image": "", "prompt": "a", "adapter": 1}', 400),
    "a list of pictures": (b'{"image": [""], "prompt": "a"}', 400),
    "deep": (b"[" * 100_000, 400),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told(address, name):
    body, wanted = BAD[name]
    status, reply = send(f"{address}/answer", body)
    assert (status, bool(reply["error"])) == (wanted, True)
    assert page(address)


def test_bad_pictures_and_prompts(address):
    assert "20000×20000" in ask(address, bomb())[1]["error"]
    assert "does not fit" in ask(address, prompt="word " * 400)[1]["error"]
    assert send(f"{address}/other", b"{}")[0] == 404
    large = {"Content-Length": str(2**30)}
    assert send(f"{address}/answer", b"", **large)[0] == 413
    for wrong in ("x", "-1", "1_0", "1" * 5000):
        length = {"Content-Length": wrong}
        assert send(f"{address}/answer", b"", **length)[0] == 400
    assert ask(address)[0] == 200
