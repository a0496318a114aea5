"""The ASGI application: endpoints around one model."""

import asyncio
import contextlib
import math

from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client import generate_latest
from starlette.responses import FileResponse
from starlette.responses import JSONResponse
from starlette.responses import Response
from starlette.routing import Route
from starlette.routing import Router

import keras_paligemma
from keras_paligemma import shipped
from keras_paligemma.serve import openai
from keras_paligemma.serve import own
from keras_paligemma.serve import pages
from keras_paligemma.serve.asking import Service
from keras_paligemma.serve.batching import Batches
from keras_paligemma.serve.limits import Guard
from keras_paligemma.serve.metrics import Metrics
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Refused
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.published_codecs import SIZES


def make_app(
    model,
    name,
    *,
    milliseconds=2.0,
    room=256,
    limits=None,
    codec=None,
    token=None,
    hosts=None,
    fetches=False,
):
    """Create the ASGI application that serves a model.

    Args:
        model: `PresetModel` or `SavedModel`.
        name: str, the model's name for clients.
        milliseconds: float, maximum time that a request waits for others.
        room: int, maximum number of waiting requests; more are refused with
            429.
        limits: `Limits`.
        codec: `MaskCodec` that decodes masks. `None` is the nano preset's; a
            model of a published size then has none, and segments nothing.
        token: str, the bearer token that requests must carry, or `None`.
        hosts: strs, names of the server; any if `None`.
        fetches: bool, whether to fetch pictures from http(s) URLs.

    Returns:
        `Guard` around a `starlette.routing.Router`.

    Raises:
        ValueError: if sizes are invalid, or an adapter has the model's name.
    """
    if room < 1 or not 0 <= milliseconds < math.inf:
        raise ValueError(
            "Expected: room for one request or more, and 0 ms or more. "
            f"Received: {room} and {milliseconds} ms."
        )
    if name in (model.adapters or ()):
        raise ValueError(
            "Clients choose the model or an adapter by name. Received: a model "
            f"and an adapter named {name!r}. Expected: another --name."
        )
    limits = limits or Limits()
    metrics = Metrics()
    batches = Batches(model, milliseconds, room, metrics)
    # Its masks would be wrong, and look like masks.
    if codec is None and model.hidden_dim not in SIZES:
        codec = MaskCodec.embedded()
    service = Service(name, model, batches, limits, codec, fetches)
    posts = {
        "/v1/chat/completions": (openai.chat, openai.DESCRIBED),
        "/answer": (own.answer, own.ANSWER),
        "/detect": (own.detect, own.OBJECTS),
        "/segment": (own.segment, own.OBJECTS),
    }
    described = pages.openapi(
        {path: fields for path, (_, fields) in posts.items()},
        keras_paligemma.__version__,
    )

    async def health(request):
        return JSONResponse({"status": "ok"})

    async def readiness(request):
        if batches.ready.is_set() and not batches.closed:
            return JSONResponse({"status": "ready"})
        raise Refused(503, batches.closed or "The model warms up.")

    async def counts(request):
        return Response(
            generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST
        )

    async def page(request):
        return FileResponse(shipped.folder("examples") / "serve" / "page.html")

    async def description(request):
        return JSONResponse(described)

    async def description_page(request):
        return Response(pages.PAGE, media_type="text/html; charset=utf-8")

    @contextlib.asynccontextmanager
    async def lifespan(app):
        batches.start()
        yield
        await asyncio.to_thread(batches.stop)
        service.readers.shutdown(wait=False, cancel_futures=True)

    gets = {
        "/": page,
        "/docs": description_page,
        "/openapi.json": description,
        "/healthz": health,
        "/readyz": readiness,
        "/metrics": counts,
        "/v1/models": openai.models(service),
        "/v1/models/{name:path}": openai.model(service),
    }
    # Routes are tried in turn: first those that models answer.
    routes = [
        Route(path, make(service), methods=["POST"])
        for path, (make, _) in posts.items()
    ]
    routes += [Route(path, endpoint) for path, endpoint in gets.items()]

    return Guard(
        Router(routes, lifespan=lifespan),
        limits,
        metrics,
        posts,
        gets,
        token,
        hosts,
        batches.failed,
    )
