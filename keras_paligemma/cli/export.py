"""`keras-paligemma export`: export a checkpoint for other programs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import Dtype
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import Source
from keras_paligemma.cli.options import given


def export(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder that is new or empty")],
    format: Annotated[
        str,
        typer.Option(help="savedmodel | stablehlo | onnx | openvino | litert"),
    ] = "savedmodel",
    dtype: Dtype = None,
    quantize: Quantize = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a LoRA adapter, which is named after it. May be "
            "repeated, largest rank first; the last is the default"
        ),
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest prompt")
    ] = None,
    response_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest answer")
    ] = None,
) -> None:
    """Export a checkpoint for other programs.

    A SavedModel takes encoded pictures and text, and returns text.
    """
    from keras_paligemma.export import targets

    # The backend that writes a format also reads the source.
    writer = targets.TARGETS.get(format)
    os.environ["KERAS_BACKEND"] = writer.backend if writer else "tensorflow"
    targets.check_target(target, format)
    with quiet_imports():
        from keras_paligemma.checkpoints import engine
        from keras_paligemma.layers.weight import dequantized
        from keras_paligemma.models.causal_lm import PaliGemmaCausalLM

    model = PaliGemmaCausalLM.from_preset(
        source,
        compile=False,
        **given(
            dtype=dtype,
            quantize=quantize,
            prompt_length=prompt_length,
            response_length=response_length,
        ),
    )
    for folder in adapter or []:
        model.load_adapter(folder, folder.resolve().name)
    targets.export(model, target, format)
    count = engine.count(dequantized(model.backbone.weights_by_name()))
    typer.echo(f"{target}: {count:,} parameters as {format}")
