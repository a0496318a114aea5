"""The application around the model: queue, limits, errors, the process."""

import base64
import json
import math
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from starlette.testclient import TestClient

from keras_paligemma import cli
from keras_paligemma.cli.serve import serve
from keras_paligemma.generation.texts import cut
from keras_paligemma.serve import app
from keras_paligemma.serve import running
from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.limits import LOOPBACK
from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Request
from tests.helpers.encoded_pictures import bomb
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.serve.plain_model import PlainModel

IMAGE = base64.b64encode(encode(picture(), "PNG")).decode()


def ask(client, prompt="caption en", path="/answer", **fields):
    return client.post(path, json={"image": IMAGE, "prompt": prompt, **fields})


def test_answer_and_pages(plain):
    reply = ask(plain)
    assert reply.status_code == 200
    assert reply.json()["text"] == "caption en"
    assert "Drop a picture" in plain.get("/").text
    assert plain.get("/healthz").json() == {"status": "ok"}
    assert plain.get("/readyz").status_code == 200
    assert "openapi.json" in plain.get("/docs").text
    counts = plain.get("/metrics").text
    name = "keras_paligemma_requests_total"
    assert f'{name}{{path="/answer",status="200"}} ' in counts
    assert "keras_paligemma_tokens_total 2.0" in counts


def test_the_description_is_what_the_server_does(plain):
    paths = plain.get("/openapi.json").json()["paths"]
    posts = {
        path: paths[path]["post"] for path in paths if "post" in paths[path]
    }
    assert len(posts) == 4
    for path, post in posts.items():
        refused = [
            plain.post(path, content=b"a"),
            plain.post(path, json={"unknown": 1}),
            plain.post(path, json={}, headers={"origin": "http://a.org"}),
        ]
        for reply in refused:
            described = post["responses"][str(reply.status_code)]
            schema = described["content"]["application/json"]["schema"]
            jsonschema.validate(reply.json(), schema)
        assert [reply.status_code for reply in refused] == [415, 400, 403]
    schema = posts["/answer"]["responses"]["200"]["content"]
    schema = schema["application/json"]["schema"]
    found = ask(plain, temperature=None).json()
    assert found.keys() == schema["properties"].keys()
    jsonschema.validate(found, schema)
    [content] = posts["/answer"]["requestBody"]["content"].values()
    for temperature in (0, None):
        body = {"image": IMAGE, "prompt": "a", "temperature": temperature}
        jsonschema.validate(body, content["schema"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(body | {"temperature": 101}, content["schema"])


def test_own_stream(client):
    whole = ask(client).json()
    events = [
        json.loads(line.removeprefix("data: "))
        for line in ask(client, stream=True).text.splitlines()
        if line
    ]
    pieces = [event["piece"] for event in events[:-1]]
    assert "".join(pieces) == whole["text"] == events[-1]["text"]


def test_an_adapter_answers_who_asks_for_it(client, model):
    plain = ask(client).json()["text"]
    with model.adapters.using("styled"):
        inputs = {"images": base64.b64decode(IMAGE), "prompts": "caption en"}
        styled = model.generate(inputs)
    assert styled != plain
    assert ask(client, adapter="styled").json()["text"] == styled
    assert ask(client).json()["text"] == plain
    assert "styled" in ask(client, adapter="other").json()["error"]


def test_the_fields_of_a_request_are_the_choice():
    class Told(PlainModel):
        def read(self, picture, prompt, choice, limits):
            self.asked = prompt, choice
            return super().read(picture, prompt, choice, limits)

    model = Told()
    with TestClient(make_app(model, "told")) as client:
        fields = {"max_new_tokens": 8, "temperature": 100, "top_p": 0.5}
        fields |= {"top_k": 3, "seed": 2**31 - 1, "adapter": "styled"}
        assert ask(client, stop=["a", "b"], **fields).status_code == 200
        wanted = Choice(stop=("a", "b"), **fields)
        assert model.asked == ("caption en", wanted)
        ask(client, stop=None, seed=None, max_new_tokens=None)
        assert model.asked == ("caption en", Choice())
        body = {"image": IMAGE, "labels": ["a", "b"], "top_k": 1}
        client.post("/segment", json=body)
        assert model.asked == ("segment a ; b", Choice(top_k=1))
        long = ask(client, max_new_tokens=9)
        assert long.status_code == 400
        assert long.json()["error"] == "`max_new_tokens` is at most 8."
        # As the page asks.
        client.headers["Accept"] = "text/event-stream"
        assert ask(client).text.startswith("data: {")


def test_objects_have_scores_and_masks():
    box = [f"<loc{n:04}>" for n in (0, 0, 1023, 1023)]
    codes = [f"<seg{n:03}>" for n in range(16)]

    class Sees(PlainModel):
        def answer(self, requests, tell):
            task, label = requests[0].inputs.split()
            tokens = (*box, *codes * (task == "segment"), f" {label}", "")
            values = (-0.5,) * len(tokens)
            text = "".join(tokens)
            return [Answered(text, tokens, (7,) * len(tokens), values, "stop")]

    fields = {"image": IMAGE, "labels": ["cat"]}
    with TestClient(make_app(Sees(), "sees")) as client:
        [found] = client.post("/detect", json=fields).json()["boxes"]
        [masked] = client.post("/segment", json=fields).json()["boxes"]
        wrong = client.post("/detect", json=fields | {"labels": ["a ; b"]})
    mask = masked.pop("mask")
    assert masked == found
    assert mask.startswith("data:image/png;base64,")
    assert found.pop("score") == pytest.approx(0.3679, abs=1e-3)
    assert found == {"label": "cat", "y1": 0, "x1": 0, "y2": 1, "x2": 1}
    assert wrong.status_code == 400


def test_an_object_without_a_label_has_the_one_that_was_asked_for():
    """As in `model.detect`, for models that were trained on RefCOCO."""
    box = "<loc0000><loc0000><loc1023><loc1023>"

    class Sees(PlainModel):
        def answer(self, requests, tell):
            return [Answered(box, (box, ""), (7, 1), (-2.0, -50.0), "stop")]

    with TestClient(make_app(Sees(), "sees")) as client:
        for asked, label in (["cat"], "cat"), ("cat", "cat"), (["a", "b"], ""):
            fields = {"image": IMAGE, "labels": asked}
            [found] = client.post("/detect", json=fields).json()["boxes"]
            assert found["label"] == label
            assert found["score"] == pytest.approx(math.exp(-2))


def test_objects_with_bytes_and_before_a_stop_have_scores():
    box = [f"<loc{n:04}>" for n in (0, 0, 1023, 1023)]
    tokens = (*box, " caf", "<0xC3>", "<0xA9>", " ;", *box, " dog", "")
    values = [-0.5] * len(tokens)
    # What ends an answer is no part of a label; a label's last byte is.
    values[6], values[7], values[-1] = -1.0, -50.0, -50.0

    class Sees(PlainModel):
        def answer(self, requests, tell):
            text = "".join(tokens).replace("<0xC3><0xA9>", "é")
            text = cut(text, requests[0].choice.stop)
            return [Answered(text, tokens, (7,) * len(tokens), values, "stop")]

    fields = {"image": IMAGE, "labels": ["café", "dog"]}
    with TestClient(make_app(Sees(), "sees")) as client:
        for stop in ([], ";"):
            reply = client.post("/detect", json=fields | {"stop": stop})
            found = {
                box["label"]: box["score"] for box in reply.json()["boxes"]
            }
            wanted = {"café": math.exp(-0.5 - 2 / 3), "dog": math.exp(-1)}
            if stop:
                del wanted["dog"]
            assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("content", "headers", "status", "error"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[" * 60_000, {}, 400, "not JSON"),
        (b"[]", {}, 400, "no JSON object"),
        (b"{}", {}, 400, "`image` is missing"),
        (b'{"image": 1, "prompt": "a"}', {}, 400, "`image` is wrong"),
        (b'{"image": "a", "temperature": NaN}', {}, 400, "NaN is no number"),
        (b'{"image": "a", "prompt": "a"}', {}, 400, "not base64"),
        (b'{"image": "AAAA", "prompt": "a"}', {}, 400, "cannot be read"),
        (b'{"image": "AAAA", "prompt": "\\ud800"}', {}, 400, "`prompt` is no"),
        (b'{"image": "AAAA", "other": 1}', {}, 400, "field 'other'"),
        (b'{"image": "\\ud800", "prompt": "a"}', {}, 400, "`image` is no text"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "json"),
        (b"{}", {"Content-Type": ""}, 415, "json"),
        (b"{}", {"Origin": "https://evil.example"}, 403, "site"),
        (b" " * 70_000, {}, 413, "bytes"),
    ],
)
def test_bad_requests(plain, content, headers, status, error):
    headers = {"Content-Type": "application/json"} | headers
    reply = plain.post("/answer", content=content, headers=headers)
    assert reply.status_code == status
    assert error in reply.json()["error"]
    assert ask(plain).status_code == 200


@pytest.mark.parametrize("path", ["/answer", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"\\ud800": 1}', "Unknown field"),
        (b'{"image": [' + b"1," * 100_000 + b"1]}", "100,000 values"),
    ],
)
def test_what_json_cannot_say_and_what_takes_long_to_parse(
    path, content, error
):
    headers = {"Content-Type": "application/json"}
    with TestClient(make_app(PlainModel(), "plain")) as client:
        reply = client.post(path, content=content, headers=headers)
    assert reply.status_code == 400
    assert error in reply.text


def test_bombs_and_failures(plain):
    content = bytearray(bomb())
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    data = base64.b64encode(content).decode()
    assert ask(plain, image=data).status_code == 413
    failed = ask(plain, "fail")
    assert failed.status_code == 500
    assert failed.json() == {"error": "The server failed to answer."}
    assert plain.get("/nothing").status_code == 404
    wrong = plain.get("/answer")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    assert plain.post("/nothing", content=b"a").status_code == 404
    for path in ("/healthz", "/v1/models/plain"):
        wrong = plain.post(path, content=b"a")
        assert wrong.status_code == 405
        assert set(wrong.headers["Allow"].split(", ")) == {"GET", "HEAD"}
    assert ask(plain).status_code == 200


# Pillow would run Ghostscript for an EPS, and decode an ICO to open it.
@pytest.mark.parametrize("kind", ["EPS", "ICO", "BMP"])
def test_pictures_of_other_formats_are_refused(plain, kind):
    data = base64.b64encode(encode(picture(), kind)).decode()
    reply = ask(plain, image=data)
    assert reply.status_code == 400
    assert "Expected: a JPEG, PNG, WebP or GIF" in reply.json()["error"]


def test_a_jpeg_of_many_scans_is_refused(plain):
    """Each would cost a pass over all pixels, for a few bytes."""
    content = encode(picture(), "JPEG")
    for scans, status in ((60, 200), (64, 400)):
        more = base64.b64encode(content + b"\xff\xda" * scans).decode()
        assert ask(plain, image=more).status_code == status


def test_no_other_site_reads_an_answer(plain):
    """Include the preflight request that browsers send for other sites."""
    asks = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    replies = [
        plain.options("/answer", headers=asks),
        plain.get("/v1/models", headers={"Origin": "https://evil.example"}),
        ask(plain),
        plain.get("/metrics"),
    ]
    assert [reply.status_code for reply in replies] == [403, 403, 200, 200]
    for reply in replies:
        assert "access-control-allow-origin" not in reply.headers
    own = plain.get("/v1/models", headers={"Origin": "http://testserver"})
    assert own.status_code == 200


def test_token_and_hosts():
    app = make_app(PlainModel(), "plain", token="open", hosts=["here"])
    with TestClient(app, base_url="http://here") as client:
        assert ask(client).status_code == 401
        assert client.get("/healthz").status_code == 200
        client.headers["Authorization"] = "Bearer open"
        assert ask(client).status_code == 200
        client.headers["Host"] = "evil.example"
        assert ask(client).status_code == 421


def test_batches_and_a_full_queue():
    model = PlainModel(held=True, largest=4)
    app = make_app(model, "plain", room=4, milliseconds=0)
    with TestClient(app) as client, ThreadPoolExecutor(5) as threads:
        first = threads.submit(ask, client, "first")
        model.begun.wait()
        waits = [threads.submit(ask, client, f"{n}") for n in range(4)]
        while "queue 4.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        full = ask(client)
        assert full.status_code == 429
        assert full.headers["Retry-After"] == "1"
        model.go.set()
        assert first.result().json()["text"] == "first"
        texts = [wait.result().json()["text"] for wait in waits]
        assert texts == ["0", "1", "2", "3"]
    assert model.sizes == [1, 4]


def test_who_is_alone_waits_for_nobody():
    """The test would time out if a request waited for the full minute."""
    model = PlainModel(held=True, largest=2)
    app = make_app(model, "plain", milliseconds=60_000)
    with TestClient(app) as client, ThreadPoolExecutor(3) as threads:
        first = threads.submit(ask, client)
        model.begun.wait()
        waits = [threads.submit(ask, client) for _ in range(2)]
        while "queue 2.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        model.go.set()
        assert first.result().status_code == 200
        assert [wait.result().status_code for wait in waits] == [200, 200]
        # The previous batch had two requests, so the next one waits for two.
        waits = [threads.submit(ask, client)]
        while "queue 1.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        waits.append(threads.submit(ask, client))
        assert [wait.result().status_code for wait in waits] == [200, 200]
    assert model.sizes == [1, 2, 2]


class Fails(PlainModel):
    """A model whose compilation fails before or after it is ready."""

    def __init__(self, before):
        super().__init__(held=True)
        self.before = before

    def warm_ups(self):
        batches = [[Request("fail", Choice())]]
        return (batches, []) if self.before else ([], batches)


def test_what_cannot_be_compiled(caplog):
    model = Fails(before=True)
    with TestClient(make_app(model, "fails")) as client:
        assert client.get("/readyz").status_code == 503
        with ThreadPoolExecutor(1) as threads:
            early = threads.submit(ask, client)
            while "queue 1.0" not in client.get("/metrics").text:
                time.sleep(0.01)
            model.go.set()
        assert early.result().status_code == 503
        late = ask(client)
        assert (late.status_code, client.get("/healthz").status_code) == (
            503,
            200,
        )
        assert client.get("/readyz").json() == late.json()
    assert "a secret" in caplog.text
    assert "secret" not in late.text
    model = Fails(before=False)
    with TestClient(make_app(model, "fails")) as client:
        model.begun.wait()
        model.go.set()
        assert ask(client).status_code == 200
        assert client.get("/readyz").status_code == 200


def test_names_and_token_of_the_command(random_preset, monkeypatch):
    made = {}
    monkeypatch.setattr(
        app, "make_app", lambda _, name, **options: options | {"name": name}
    )
    monkeypatch.setattr(
        running, "run", lambda options, *_: made.update(options)
    )
    monkeypatch.delenv("KERAS_PALIGEMMA_TOKEN", raising=False)
    serve(str(random_preset), allow_host=["Example.ORG"])
    assert made["hosts"] == {*LOOPBACK, "example.org"}
    assert made["token"] is None
    monkeypatch.chdir(random_preset)
    # A header has no line's end, which files of tokens have.
    monkeypatch.setenv("KERAS_PALIGEMMA_TOKEN", "secret\n")
    serve(".")
    assert (made["name"], made["token"]) == ("floats", "secret")
    monkeypatch.setenv("KERAS_PALIGEMMA_TOKEN", " ")
    with pytest.raises(ValueError, match="KERAS_PALIGEMMA_TOKEN is set, but"):
        serve(str(random_preset))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "--port"),
        (["--max-connections", "0"], "--max-connections"),
        (["--host", ""], "Received: --host ''"),
    ],
)
def test_options_of_the_command_are_checked_at_once(
    monkeypatch, capsys, arguments, message
):
    """Before the model is loaded; an empty host would be all addresses."""
    command = ["keras-paligemma", "serve", "/no/such/preset", *arguments]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    assert message in capsys.readouterr().err


def test_what_cannot_be_served():
    for milliseconds in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"Received: .*{milliseconds} ms"):
            make_app(PlainModel(), "plain", milliseconds=milliseconds)
    model = PlainModel()
    model.adapters = ("plain", "styled")
    with pytest.raises(ValueError, match="adapter named 'plain'.*--name"):
        make_app(model, "plain")
