"""`keras-paligemma serve`: serve a model over HTTP."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import CacheDtype
from keras_paligemma.cli.options import Codec
from keras_paligemma.cli.options import Dtype
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import Source
from keras_paligemma.cli.options import given
from keras_paligemma.cli.options import read_codec


def serve(
    source: Source,
    host: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 to accept other machines")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 for any free one")
    ] = 8000,
    batch: Annotated[
        int, typer.Option(help="Largest batch of requests, a power of two")
    ] = 16,
    wait_ms: Annotated[
        float,
        typer.Option(
            help="Milliseconds that a request waits for others at most"
        ),
    ] = 2.0,
    queue: Annotated[
        int, typer.Option(help="Waiting requests before status 429")
    ] = 256,
    name: Annotated[
        str | None, typer.Option(help="Model's name; default: the source's")
    ] = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER",
            help="A LoRA adapter, and the name that clients give; default: "
            "the folder's. May be repeated",
        ),
    ] = None,
    codec: Codec = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that clients use for this server"),
    ] = None,
    fetch_images: Annotated[
        bool, typer.Option(help="Fetch pictures from http(s) URLs")
    ] = False,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes")] = 20 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1)] = 40_000_000,
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters")] = 4096,
    max_seconds: Annotated[
        float,
        typer.Option(min=1, help="Limit for a client to send, and to receive"),
    ] = 30.0,
    max_connections: Annotated[int, typer.Option(min=1)] = 1024,
) -> None:
    """Serve a checkpoint, or the folder of a SavedModel.

    If KERAS_PALIGEMMA_TOKEN is set, clients must send it as a bearer token.
    """
    try:
        from keras_paligemma.serve import saved_model
        from keras_paligemma.serve.app import make_app
        from keras_paligemma.serve.limits import LOOPBACK
        from keras_paligemma.serve.requests import Limits
        from keras_paligemma.serve.running import run
    except ImportError as error:
        raise ImportError(
            f"`serve` needs {error.name}. Expected: pip install "
            '"keras_paligemma[serve]".'
        ) from error
    if not host:
        raise ValueError(
            "An empty host would be all addresses of this machine. Received: "
            "--host ''. Expected: 0.0.0.0 for these, or another address."
        )
    token = _token()
    options = given(
        dtype=dtype,
        quantize=quantize,
        cache_dtype=cache_dtype,
        adapter=adapter or None,
    )
    masks = read_codec(codec)
    is_saved_model = saved_model.is_saved_model(source)
    load = _saved_model if is_saved_model else _preset_model
    model = load(source, batch, **options)
    hosts = None
    if allow_host or host in LOOPBACK:
        hosts = {*LOOPBACK, *(name.lower() for name in allow_host or ())}
    limits = Limits(
        max_body, max_pixels, max_prompt, max_seconds, max_connections
    )
    app = make_app(
        model,
        # The name of "." is that of its folder.
        name or Path(os.path.abspath(source)).name,
        milliseconds=wait_ms,
        room=queue,
        limits=limits,
        codec=masks,
        token=token,
        hosts=hosts,
        fetches=fetch_images,
    )
    run(app, host, port, limits)


def _token():
    """Return the bearer token of the environment, or `None`."""
    token = os.environ.get("KERAS_PALIGEMMA_TOKEN")
    if token is not None and not token.strip():
        raise ValueError(
            "KERAS_PALIGEMMA_TOKEN is set, but empty. Expected: a token, or no "
            "such variable, with which the server takes all requests."
        )
    # Files of tokens end with a newline, which no header can have.
    return token and token.strip()


def _saved_model(source, batch, **options):
    """Load the folder of a SavedModel, which takes no options."""
    if options:
        raise ValueError(
            "A SavedModel is served as it was exported. Received: "
            f"{source} with {options}. Expected: a checkpoint, or none of "
            "these options."
        )
    # A SavedModel needs TensorFlow, whatever the configured backend.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    with quiet_imports():
        from keras_paligemma.serve.saved_model import SavedModel

        return SavedModel(source, batch)


def _preset_model(source, batch, cache_dtype=None, adapter=(), **options):
    """Load a checkpoint and its adapters."""
    with quiet_imports():
        from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
        from keras_paligemma.serve.preset_model import PresetModel
    model = PaliGemmaCausalLM.from_preset(source, **options)
    used = model.adapters.active
    for name, folder in map(named_folder, adapter):
        model.load_adapter(folder, name)
    # Clients name adapters; the source itself answers those that name none.
    model.adapters.select(used)
    return PresetModel(model, batch, cache_dtype)


def named_folder(adapter):
    """Return the name and the folder of `[NAME=]FOLDER`."""
    name, equals, folder = adapter.partition("=")
    # A folder's own name may have the sign.
    if not equals or os.path.exists(adapter):
        return Path(os.path.abspath(adapter)).name, adapter
    return name, folder
