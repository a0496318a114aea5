"""What a chat request means, and the events of its stream."""

import base64
import json

import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.requests import Answered
from keras_paligemma.serve.requests import Choice
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.serve.plain_model import PlainModel

pytestmark = pytest.mark.any_backend

URI = (
    "data:image/png;base64,"
    + base64.b64encode(encode(picture(), "PNG")).decode()
)
IMAGE = {"type": "image_url", "image_url": {"url": URI, "detail": "high"}}
TEXT = {"type": "text", "text": "caption en"}


class Told(PlainModel):
    """A model that keeps how it was asked, and whose tokens are letters."""

    most_alternatives = 5

    def read(self, picture, prompt, choice, limits):
        self.choice = choice
        return super().read(picture, prompt, choice, limits)

    def answer(self, requests, tell):
        for row, request in enumerate(requests):
            if request.streams:
                tell(row, "a")
                tell(row, "b")
        likeliest = ((("a", -0.5),), (("b", -1.0), ("é", -1.5)))
        answered = Answered(
            *("ab", ("a", "b"), (7, 8), (-0.5, -1.0), "length", likeliest, 3)
        )
        return [answered] * len(requests)


@pytest.fixture(scope="module")
def model():
    return Told()


@pytest.fixture(scope="module")
def client(model):
    with TestClient(make_app(model, "tiny")) as client:
        yield client


def ask(client, content=(IMAGE, TEXT), **fields):
    message = {"role": "user", "content": list(content)}
    body = {"model": "tiny", "messages": [message]} | fields
    # httpx's own JSON refuses halves of characters.
    return client.post(
        "/v1/chat/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, {}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        (
            {"max_tokens": 3, "max_completion_tokens": 2},
            {"max_new_tokens": 2},
        ),
        (
            {"max_tokens": None, "max_completion_tokens": 2**31},
            {"max_new_tokens": 2**31},
        ),
        ({"temperature": 2, "top_p": 0.5}, {"temperature": 2, "top_p": 0.5}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "ab"]}, {"stop": ("a", "ab")}),
        ({"seed": -1}, {"seed": 2**31 - 1}),
        ({"seed": 2**31 + 5}, {"seed": 5}),
        ({"logprobs": True, "top_logprobs": 5}, {"alternatives": 5}),
        # OpenAI's clients may send what is not set, and for its bookkeeping.
        (
            dict.fromkeys(["n", "seed", "stop", "stream", "stream_options"])
            | dict.fromkeys(["temperature", "top_p", "logprobs", "user"])
            | {"metadata": {"a": "b"}, "store": False, "presence_penalty": 0.0},
            {},
        ),
    ],
)
def test_the_fields_of_a_request(client, model, fields, wanted):
    assert ask(client, **fields).status_code == 200
    assert model.choice == Choice(**wanted)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"seed": 2**63 + 1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", None]}, "stop"),
        ({"stream": "true"}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": []}, "messages"),
        ({"messages": {"role": "user", "content": [IMAGE, TEXT]}}, "messages"),
        ({"messages": ["caption en"]}, "messages"),
        ({"messages": [{"content": [IMAGE, TEXT]}]}, "messages"),
        *(
            (
                {"messages": [{"role": role, "content": [IMAGE, TEXT]}]},
                "messages",
            )
            for role in ("system", "assistant", "tool", None)
        ),
        *(
            ({"content": content}, "messages")
            for content in (
                *([], [IMAGE], [TEXT], [IMAGE, TEXT, TEXT]),
                *([IMAGE, IMAGE, TEXT], [IMAGE, TEXT, None], [IMAGE, "a"]),
                [IMAGE, {"type": "text", "text": None}],
                [IMAGE, {"type": "input_text", "text": "a"}],
                [{"type": "image_url"}, TEXT],
                [{"type": "image_url", "image_url": {"url": None}}, TEXT],
                [{"type": "image_url", "image_url": "a.png"}, TEXT],
                [{"type": "image_url", "image_url": "data:,a"}, TEXT],
                [IMAGE, {"type": "text", "text": "\ud800"}],
            )
        ),
    ],
)
def test_what_is_no_request(client, fields, field):
    reply = ask(client, **fields)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)


def test_the_parts_of_a_message_come_in_any_order(client):
    short = {"type": "image_url", "image_url": URI.replace("data", "DATA")}
    for content in ([TEXT, IMAGE], [short, TEXT]):
        reply = ask(client, content).json()
        assert reply["choices"][0]["message"]["content"] == "ab"


def test_log_probabilities_and_counts(client):
    reply = ask(client, n=2, logprobs=True, top_logprobs=2).json()
    a, b, accented = (
        {"token": token, "logprob": value, "bytes": list(token.encode())}
        for token, value in (("a", -0.5), ("b", -1.0), ("é", -1.5))
    )
    content = [a | {"top_logprobs": [a]}, b | {"top_logprobs": [b, accented]}]
    logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": "ab"}
    assert reply["choices"] == [
        {
            "index": index,
            "message": message,
            "finish_reason": "length",
            "logprobs": logprobs,
        }
        for index in (0, 1)
    ]
    # The prompt was read once for both answers.
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert reply["usage"] == counts
    plain = ask(client).json()
    assert plain["choices"][0]["logprobs"] is None
    assert plain["object"] == "chat.completion"


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("logprobs", [True, False])
def test_the_events_of_a_stream(client, counts, logprobs):
    options = {"include_usage": counts}
    reply = ask(
        client, n=2, stream=True, stream_options=options, logprobs=logprobs
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    *lines, done = reply.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    if counts:
        last = events.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
    assert not any("usage" in event for event in events)
    pieces = [event["choices"][0] for event in events]
    for index in (0, 1):
        first, *middle, last = [p for p in pieces if p["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert [piece["delta"] for piece in middle] == [
            {"content": "a"},
            {"content": "b"},
        ]
        assert [piece["finish_reason"] for piece in middle] == [None] * 2
        assert (last["delta"], last["finish_reason"]) == ({}, "length")
        assert ("logprobs" in last) == logprobs
