"""OpenAI's own client with a tiny model."""

import base64
import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer

import httpx
import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Limits
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.serve.plain_model import PlainModel

openai = pytest.importorskip("openai")

PNG = encode(picture(), "PNG")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


def api_of(client):
    """Return OpenAI's client for a `TestClient`'s application."""

    # Starlette's client is an httpx client, but openai needs its own type.
    def handle(request):
        reply = client.request(
            request.method,
            request.url.path,
            content=request.content,
            headers={"Content-Type": "application/json"},
        )
        return httpx.Response(
            reply.status_code,
            content=reply.content,
            headers={"Content-Type": reply.headers["content-type"]},
        )

    transport = httpx.Client(transport=httpx.MockTransport(handle))
    return openai.OpenAI(
        api_key="none",
        base_url="http://testserver/v1",
        http_client=transport,
        max_retries=0,
    )


@pytest.fixture
def api(client):
    with api_of(client) as api:
        yield api


def messages(prompt="caption en", url=URI):
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": prompt},
    ]
    return [{"role": "user", "content": parts}]


def ask(api, prompt="caption en", **options):
    return api.chat.completions.create(
        model="tiny", messages=messages(prompt), **options
    )


class Pictures(BaseHTTPRequestHandler):
    """A site with a picture, one that is sent slowly, and a large file."""

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            return self.end_headers()
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.path == "/slow":
                while True:
                    self.wfile.write(PNG[:1])
                    time.sleep(0.1)
            if self.path == "/large":
                self.wfile.write(bytes(2**20))
            self.wfile.write(PNG)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fetches", [True, False])
def test_pictures_are_fetched_within_limits(site, fetches):
    limits = Limits(seconds=1, body=2**19)
    app = make_app(PlainModel(), "tiny", limits=limits, fetches=fetches)
    statuses = {}
    with TestClient(app) as client:
        for path in ("picture", "moved", "none", "slow", "large"):
            body = {"model": "tiny", "messages": messages(url=f"{site}/{path}")}
            reply = client.post("/v1/chat/completions", json=body)
            statuses[path] = reply.status_code
        for url in ("http://localhost:port/", "http://local host/", "file:/a"):
            body = {"model": "tiny", "messages": messages(url=url)}
            reply = client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 400
    wanted = dict(picture=200, moved=200, none=400, slow=400, large=413)
    assert statuses == (wanted if fetches else dict.fromkeys(wanted, 400))


def test_models_are_described(api):
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="No model 'large'"):
        api.models.retrieve("large")


def test_errors_of_the_server_are_in_openais_form():
    with TestClient(make_app(PlainModel(), "tiny")) as client:
        with api_of(client) as api, pytest.raises(openai.APIError) as raised:
            ask(api, "fail")
    assert raised.value.type == "server_error"


def test_bytes_of_a_character_are_its_own():
    class Bytes(PlainModel):
        def answer(self, requests, tell):
            tokens = ("<0xE2>", "<0x82>", "<0xAC>", " a")
            return [Answered(" \u20ac a", tokens, (7,) * 4, (0.0,) * 4, "stop")]

    with TestClient(make_app(Bytes(), "tiny")) as client:
        with api_of(client) as api:
            [choice] = ask(api, logprobs=True).choices
    found = [token.bytes for token in choice.logprobs.content]
    assert bytes(sum(found, [])).decode() == "\u20ac a"


def test_answers_are_those_of_generate(api, model):
    expected = model.generate(
        {"images": PNG, "prompts": "caption en"}, details=True
    )
    reply = ask(api, logprobs=True, top_logprobs=2)
    [choice] = reply.choices
    assert choice.message.content == expected.text
    assert [
        place.logprob for place in choice.logprobs.content
    ] == pytest.approx(expected.log_probabilities, rel=1e-4)
    for place in choice.logprobs.content:
        assert len(place.top_logprobs) == 2
        assert place.logprob <= place.top_logprobs[0].logprob + 1e-5
    assert reply.usage.completion_tokens == len(expected.token_ids)
    assert reply.model == "tiny"


def test_a_stream_is_the_whole_answer(api):
    whole = ask(api).choices[0]
    events = list(ask(api, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0] for event in events if event.choices]
    text = "".join(piece.delta.content or "" for piece in pieces)
    assert text == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason
    assert events[-1].usage.completion_tokens > 0


def test_length_seed_copies_and_stop(api):
    short = ask(api, max_tokens=2)
    assert short.usage.completion_tokens == 2
    assert short.choices[0].finish_reason == "length"
    drawn = [
        [
            choice.message.content
            for choice in ask(
                api, n=3, seed=seed, temperature=1.5, top_p=0.99
            ).choices
        ]
        for seed in (4, 4, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1
    text = ask(api).choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    stopped = ask(api, stop=stop).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"messages": messages(url="https://example.com/a.png")}, "messages"),
        ({"messages": messages(url="data:image/png;base64,AAAA")}, "image"),
        ({"messages": [{"role": "user", "content": "no picture"}]}, "messages"),
        ({"messages": messages() * 2}, "messages"),
        ({"messages": messages("many words " * 20)}, "prompt"),
        ({"messages": messages("a" * 5000)}, "messages"),
        ({"temperature": 9.0}, "temperature"),
        ({"n": 100}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ],
)
def test_errors_are_openais(api, changes, field):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(
            **{"model": "tiny", "messages": messages()} | changes
        )
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"


def test_models(api):
    assert [entry.id for entry in api.models.list()] == ["tiny", "styled"]
    text = ask(api).choices[0].message.content
    styled = api.chat.completions.create(model="styled", messages=messages())
    assert styled.choices[0].message.content != text
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="other", messages=messages())
