"""`keras-paligemma serve`: a model that answers over HTTP."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import Source


def serve(
    source: Source,
    host: Annotated[
        str, typer.Option(help="Address; others than this machine by 0.0.0.0")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    batch: Annotated[
        int, typer.Option(help="Most requests a batch, a power of two")
    ] = 8,
    wait_ms: Annotated[
        float, typer.Option(help="Milliseconds that a request waits for others")
    ] = 2.0,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait; then 429")
    ] = 256,
    name: Annotated[
        str | None, typer.Option(help="Model's name; the source's if none")
    ] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    quantize: Quantize = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a LoRA adapter; may come again"),
    ] = None,
    codec: Annotated[
        Path | None,
        typer.Option(help="Decoder of masks, such as vae-oid.npz"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients call this server"),
    ] = None,
    fetch_images: Annotated[
        bool, typer.Option(help="Fetch pictures of http(s) addresses")
    ] = False,
    max_body: Annotated[int, typer.Option(help="Bytes")] = 20 * 2**20,
    max_pixels: Annotated[int, typer.Option()] = 40_000_000,
    max_prompt: Annotated[int, typer.Option(help="Characters")] = 4096,
    max_seconds: Annotated[
        float, typer.Option(help="For a client to send, and to take")
    ] = 30.0,
    max_connections: Annotated[int, typer.Option()] = 1024,
) -> None:
    """Serve a checkpoint, or a SavedModel's folder.

    Clients must bear the token in KERAS_PALIGEMMA_TOKEN, if it is set.
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
    if saved_model.is_saved_model(source):
        # Which needs TensorFlow, whatever computes elsewhere.
        os.environ["KERAS_BACKEND"] = "tensorflow"
        with quiet_imports():
            model = saved_model.SavedModel(source, batch)
    else:
        with quiet_imports():
            from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
            from keras_paligemma.serve.preset_model import PresetModel
        options = {"dtype": dtype, "quantize": quantize}
        options = {key: value for key, value in options.items() if value}
        loaded = PaliGemmaCausalLM.from_preset(source, **options)
        used = loaded.adapters.active
        for folder in adapter or []:
            loaded.load_adapter(folder, folder.resolve().name)
        # Clients name those; who names none asks what the source is.
        loaded.adapters.select(used)
        model = PresetModel(loaded, batch)
    if codec is not None:
        from keras_paligemma.tasks.mask_codec import MaskCodec

        codec = MaskCodec.load(codec)
    hosts = allow_host
    if hosts is None and host in LOOPBACK:
        hosts = LOOPBACK
    limits = Limits(
        max_body, max_pixels, max_prompt, max_seconds, max_connections
    )
    app = make_app(
        model,
        name or Path(source).name,
        milliseconds=wait_ms,
        room=queue,
        limits=limits,
        codec=codec,
        token=os.environ.get("KERAS_PALIGEMMA_TOKEN"),
        hosts=hosts,
        fetches=fetch_images,
    )
    run(app, host, port, limits)
