"""Chat completions in OpenAI's format.

PaliGemma answers one prompt about one picture: a conversation is one user
message with one `image_url` and one text. Other conversations are refused, not
shortened. Without a temperature decoding is greedy, as in the models'
evaluation. `max_tokens` is limited to the model's longest answer.
"""

import asyncio
import functools
import time
import uuid
from typing import NoReturn

from starlette.responses import JSONResponse
from starlette.responses import StreamingResponse

from keras_paligemma.serve.asking import accepted
from keras_paligemma.serve.asking import answers_of
from keras_paligemma.serve.asking import event_of
from keras_paligemma.serve.asking import events_of
from keras_paligemma.serve.limits import openai_error
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Field
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import check_prompt
from keras_paligemma.serve.requests import read_base64
from keras_paligemma.serve.requests import read_fields
from keras_paligemma.serve.requests import read_json
from keras_paligemma.serve.requests import read_stop
from keras_paligemma.serve.tokens import BYTE

FIELDS = {
    "model": Field("string", "Name of the model or an adapter", default=...),
    "messages": Field("any", "One: a user's image_url and text", default=...),
    "max_tokens": Field("integer", "Longest answer", 1, 2**31),
    "max_completion_tokens": Field("integer", "As max_tokens", 1, 2**31),
    "temperature": Field("number", "0 decodes greedily", 0, 2, 0.0),
    "top_p": Field("number", "Sample from this probability", 1e-6, 1, 1.0),
    "n": Field("integer", "Number of answers", 1, 128, 1),
    "seed": Field("integer", "Repeats samples", -(2**63), 2**63),
    "stop": Field("strings", "Strings that end the answer"),
    "stream": Field("boolean", "Server-sent events", default=False),
    "stream_options": Field("any", "Object, with include_usage"),
    "logprobs": Field("boolean", "Return log-probabilities", default=False),
    "top_logprobs": Field("integer", "Likeliest tokens each", 0, 20, 0),
    "frequency_penalty": Field("number", "0 alone", 0, 0, 0),
    "presence_penalty": Field("number", "0 alone", 0, 0, 0),
}
# Fields for OpenAI's own bookkeeping: they change no answer.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier")
DESCRIBED = FIELDS | {name: Field("any", "Ignored") for name in IGNORED}


def models(service):
    """Return the endpoint that lists the model and its adapters."""

    async def endpoint(request):
        data = [_model(name) for name in _names(service)]
        return JSONResponse({"object": "list", "data": data})

    return endpoint


def model(service):
    """Return the endpoint that describes the model, or an adapter."""

    async def endpoint(request):
        name = request.path_params["name"]
        if name not in _names(service):
            raise _unknown(service, name)
        return JSONResponse(_model(name))

    return endpoint


def _names(service):
    return [service.name, *(service.model.adapters or ())]


def _model(name):
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "keras_paligemma",
    }


def _unknown(service, name):
    return Refused(
        404,
        f"No model {name[:60]!r}. Expected: one of {_names(service)}.",
        "model",
    )


def chat(service):
    """Return the endpoint of chat completions."""

    async def endpoint(request):
        body = read_json(request.scope["body"])
        fields = read_fields(body, FIELDS, IGNORED)
        address, prompt = _message(fields["messages"])
        check_prompt(prompt, service.limits, "messages")
        choice = _choice(service, fields)
        most = min(service.limits.copies, service.batches.room)
        if fields["n"] > most:
            raise Refused(400, f"`n` is at most {most}.", "n")
        fetched = None
        if address.startswith(("http://", "https://")):
            fetched = await _fetched(service, address)
        replies = service.ask(
            lambda: _inside(address) if fetched is None else fetched,
            prompt,
            choice,
            fields["n"],
            fields["stream"],
        )
        reply = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": fields["model"],
        }
        if fields["stream"]:
            await accepted(replies, request.receive)
            return StreamingResponse(
                _stream(reply, replies, fields),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        answers = await answers_of(replies, request.receive)
        reply |= {
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": answer.text},
                    "finish_reason": answer.finish,
                    "logprobs": _logprobs(answer)
                    if fields["logprobs"]
                    else None,
                }
                for index, answer in enumerate(answers)
            ],
            "usage": _usage(answers),
        }
        return JSONResponse(reply)

    return endpoint


def _choice(service, fields):
    # `None`: only the model knows the names of its adapters.
    name = fields["model"]
    if service.model.adapters is not None and name not in _names(service):
        raise _unknown(service, name)
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise Refused(
            400, "`top_logprobs` needs logprobs=true.", "top_logprobs"
        )
    most = service.model.most_alternatives
    if fields["top_logprobs"] > most:
        raise Refused(400, f"`top_logprobs` is at most {most}.", "top_logprobs")
    seed = fields["seed"]
    return Choice(
        fields["max_completion_tokens"] or fields["max_tokens"],
        fields["temperature"],
        fields["top_p"],
        None,
        None if seed is None else seed % 2**31,
        read_stop(fields["stop"]),
        None if name == service.name else name,
        fields["top_logprobs"],
    )


def _message(messages):
    """Return URL and text of the only message that PaliGemma can answer."""

    def refuse(reason) -> NoReturn:
        raise Refused(
            400,
            f"{reason} Expected: one message of the user with one `image_url` "
            "and one text: the model answers a prompt about a picture.",
            "messages",
        )

    if not isinstance(messages, list) or len(messages) != 1:
        refuse("This is no prompt.")
    message = messages[0]
    if not isinstance(message, dict) or message.get("role") != "user":
        refuse("The message is not of the user.")
    parts = message.get("content")
    if not isinstance(parts, list):
        refuse("The message has no picture.")
    texts, addresses = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                refuse("`image_url` has no `url`.")
            addresses.append(url)
        else:
            refuse("A part is neither a text nor an `image_url`.")
    if len(texts) != 1 or len(addresses) != 1:
        refuse(f"Received: {len(addresses)} pictures, {len(texts)} texts.")
    return addresses[0], texts[0]


def _inside(address):
    """Return the bytes inside a data: URI."""
    if address[:5].lower() != "data:":
        raise Refused(400, "Expected: a data: URI.", "messages")
    return read_base64(address, "messages")


@functools.cache
def _certificates():
    """Read the certificates of known authorities once, not in each request."""
    import httpx

    return httpx.create_ssl_context()


async def _fetched(service, address):
    """Return the bytes behind a URL, within the limits for a body."""
    if not service.fetches:
        raise Refused(
            400,
            "This server fetches no pictures. Expected: a data: URI.",
            "messages",
        )
    import httpx

    data = bytearray()
    try:
        async with (
            asyncio.timeout(service.limits.seconds),
            httpx.AsyncClient(
                follow_redirects=True, verify=_certificates()
            ) as client,
            # What is not compressed does not grow.
            client.stream(
                "GET", address, headers={"Accept-Encoding": "identity"}
            ) as reply,
        ):
            reply.raise_for_status()
            async for part in reply.aiter_raw():
                data += part
                if len(data) > service.limits.body:
                    raise Refused(413, "The picture is too large.", "messages")
    except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(
            400, "The picture could not be fetched.", "messages"
        ) from error
    return bytes(data)


def _usage(answers):
    prompt = max(answer.prompt_tokens for answer in answers)
    completion = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _logprobs(answer):
    def entry(token, value):
        byte = BYTE.fullmatch(token)
        return {
            "token": token,
            "logprob": value,
            "bytes": [int(byte[1], 16)] if byte else list(token.encode()),
        }

    places = answer.alternatives or [[]] * len(answer.tokens)
    return {
        "content": [
            entry(token, value)
            | {"top_logprobs": [entry(*alternative) for alternative in place]}
            for token, value, place in zip(
                answer.tokens, answer.log_probabilities, places, strict=True
            )
        ],
        "refusal": None,
    }


async def _stream(reply, replies, fields):
    """Yield the events of a stream; log-probabilities come with the last."""
    reply = reply | {"object": "chat.completion.chunk"}
    options = fields["stream_options"] or {}
    answers = []

    def chunk(index, delta, **more):
        choice = {"index": index, "delta": delta, "finish_reason": None}
        return event_of(reply | {"choices": [choice | more]})

    for index in range(len(replies)):
        yield chunk(index, {"role": "assistant", "content": ""})
    try:
        async for index, event in events_of(replies):
            if isinstance(event, str):
                yield chunk(index, {"content": event})
                continue
            answers.append(event)
            more = {"finish_reason": event.finish}
            if fields["logprobs"]:
                more["logprobs"] = _logprobs(event)
            yield chunk(index, {}, **more)
    # The status has been sent already, so the error is an event.
    except Exception as error:  # noqa: BLE001
        yield event_of({"error": openai_error(Refused.of(error))})
    else:
        if isinstance(options, dict) and options.get("include_usage"):
            usage = {"choices": [], "usage": _usage(answers)}
            yield event_of(reply | usage)
    yield "data: [DONE]\n\n"
