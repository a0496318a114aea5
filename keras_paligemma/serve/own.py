"""This package's own endpoints: answers, and objects with scores."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image
from starlette.responses import JSONResponse
from starlette.responses import StreamingResponse

from keras_paligemma.generation.texts import up_to
from keras_paligemma.serve.asking import accepted
from keras_paligemma.serve.asking import answers_of
from keras_paligemma.serve.asking import event_of
from keras_paligemma.serve.asking import events_of
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Field
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import check_prompt
from keras_paligemma.serve.requests import read_base64
from keras_paligemma.serve.requests import read_fields
from keras_paligemma.serve.requests import read_json
from keras_paligemma.serve.requests import read_stop
from keras_paligemma.serve.tokens import characters
from keras_paligemma.tasks import prompts
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.answers import read_requested
from keras_paligemma.tasks.published_codecs import PUBLISHED

COMMON = {
    "image": Field("string", "Picture in base64, or a data: URI", default=...),
    "max_new_tokens": Field("integer", "Longest answer", 1, 2**31 - 1),
    "temperature": Field("number", "0 decodes greedily", 0, 100, 0.0),
    "top_p": Field("number", "Sample from this probability", 1e-6, 1, 1.0),
    "top_k": Field("integer", "Sample from this many tokens", 1, 2**31 - 1),
    "seed": Field("integer", "Repeats samples", 0, 2**31 - 1),
    "stop": Field("strings", "Strings that end the answer"),
    "adapter": Field("string", "Name of an adapter"),
}
ANSWER = COMMON | {
    "prompt": Field("string", "Such as: caption en", default=...),
    "stream": Field("boolean", "Server-sent events", default=False),
}
OBJECTS = COMMON | {
    "labels": Field("strings", "What to look for", default=...),
}


def answer(service):
    """Return the endpoint that answers a prompt."""

    async def endpoint(request):
        fields = read_fields(read_json(request.scope["body"]), ANSWER)
        # The page requests a stream by a header, which other servers ignore.
        streams = fields[
            "stream"
        ] or "text/event-stream" in request.headers.get("accept", "")
        replies = _ask(service, fields, fields["prompt"], streams)
        if streams:
            await accepted(replies, request.receive)
            return StreamingResponse(
                _stream(service, replies), media_type="text/event-stream"
            )
        [found] = await answers_of(replies, request.receive)
        return JSONResponse(_content(service, found))

    return endpoint


def objects(service, prompt_of):
    """Return an endpoint that finds objects.

    Args:
        service: `Service`.
        prompt_of: function from labels to the prompt, `prompts.detect` or
            `prompts.segment`.
    """

    async def endpoint(request):
        fields = read_fields(read_json(request.scope["body"]), OBJECTS)
        try:
            prompt = prompt_of(fields["labels"])
        except ValueError as error:
            raise Refused(400, str(error)[:300], "labels") from error
        replies = _ask(service, fields, prompt)
        [found] = await answers_of(replies, request.receive)
        return JSONResponse(_content(service, found, fields["labels"]))

    return endpoint


def detect(service):
    """Return the endpoint that finds boxes."""
    return objects(service, prompts.detect)


def segment(service):
    """Return the endpoint that finds boxes and masks."""
    find = objects(service, prompts.segment)

    async def endpoint(request):
        if service.codec is None:
            raise Refused(
                400,
                "This server has no codec of the model's masks. Expected: a "
                f"server that was started with --codec {PUBLISHED}.",
            )
        return await find(request)

    return endpoint


def _ask(service, fields, prompt, streams=False):
    check_prompt(prompt, service.limits)
    longest = service.model.longest
    if (fields["max_new_tokens"] or 1) > longest:
        raise Refused(
            400, f"`max_new_tokens` is at most {longest}.", "max_new_tokens"
        )
    choice = Choice(
        fields["max_new_tokens"],
        fields["temperature"],
        fields["top_p"],
        fields["top_k"],
        fields["seed"],
        read_stop(fields["stop"]),
        fields["adapter"],
    )
    return service.ask(
        lambda: read_base64(fields["image"]), prompt, choice, streams=streams
    )


async def _stream(service, replies):
    try:
        async for _, event in events_of(replies):
            is_piece = isinstance(event, str)
            yield event_of(
                {"piece": event} if is_piece else _content(service, event)
            )
    # The status has been sent already, so the error is an event.
    except Exception as error:  # noqa: BLE001
        yield event_of({"error": str(Refused.of(error))})


def _content(service, found, labels=None):
    """Return an answer as JSON; the page draws `boxes`.

    An answer without any token of an object is not read for objects, unless
    `labels` were asked for.
    """
    boxes, skipped = [], []
    if labels is not None or "<" in found.text:
        tokens = found.tokens
        if tokens and not tokens[-1]:
            tokens = tokens[:-1]  # The end has no text.
        texts = up_to(characters(tokens), len(found.text))
        spelt = texts and "".join(texts) == found.text
        answer = texts if spelt else found.text
        values = found.log_probabilities[: len(texts)] if spelt else None
        if labels is None:
            objects_ = read_objects(
                answer, service.codec, log_probabilities=values
            )
        else:
            objects_ = read_requested(answer, labels, service.codec, values)
        boxes = [_object(item) for item in objects_]
        skipped = [dataclasses.asdict(part) for part in objects_.skipped]
    return {
        "text": found.text,
        "log_probabilities": found.log_probabilities,
        "finish": found.finish,
        "boxes": boxes,
        "skipped": skipped,
    }


def _object(item):
    """Return an object as JSON: edges as fractions, its mask as a PNG."""
    names = ("y1", "x1", "y2", "x2")
    content = {
        "label": item.label,
        "score": item.score,
        **dict(zip(names, item.box, strict=True)),
    }
    if item.mask is not None:
        file = io.BytesIO()
        alpha = np.where(item.mask > 0, 255, 0).astype("uint8")
        pixels = np.stack([np.full_like(alpha, 255), alpha], axis=-1)
        Image.fromarray(pixels).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        content["mask"] = f"data:image/png;base64,{data}"
    return content
