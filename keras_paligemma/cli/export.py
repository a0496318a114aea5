"""`keras-paligemma export`: a checkpoint as files that others serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import Source


def export(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder that is new or empty")],
    format: Annotated[
        str,
        typer.Option(help="savedmodel | stablehlo | onnx | openvino | litert"),
    ] = "savedmodel",
    dtype: Annotated[
        str | None, typer.Option(help="The source's if none")
    ] = None,
    quantize: Quantize = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a LoRA adapter, whose name is the adapter's; may "
            "come again, the largest first. The last one is in use"
        ),
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt")
    ] = None,
    response_length: Annotated[
        int | None, typer.Option(help="Most tokens of an answer")
    ] = None,
) -> None:
    """Write a checkpoint as files that others serve.

    A SavedModel takes files of pictures and strings, and answers in strings.
    """
    from keras_paligemma.export import targets

    # The backend that writes a format also reads the source.
    writer = targets.TARGETS.get(format)
    os.environ["KERAS_BACKEND"] = writer.backend if writer else "tensorflow"
    targets.check_target(target, format)
    with quiet_imports():
        from keras_paligemma.models.causal_lm import PaliGemmaCausalLM

    options = {
        "dtype": dtype,
        "quantize": quantize,
        "prompt_length": prompt_length,
        "response_length": response_length,
    }
    options = {key: value for key, value in options.items() if value}
    model = PaliGemmaCausalLM.from_preset(source, compile=False, **options)
    for folder in adapter or []:
        model.load_adapter(folder, folder.resolve().name)
    targets.export(model, target, format)
    typer.echo(f"{target}: {model.count_params():,} parameters as {format}")
