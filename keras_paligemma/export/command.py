"""`keras-paligemma export`: a checkpoint as files that others serve."""

import os
from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        str, typer.Argument(help="As the other commands take it")
    ],
    target: Annotated[Path, typer.Argument(help="Folder that is new or empty")],
    format: Annotated[
        str,
        typer.Option(help="savedmodel | stablehlo | onnx | openvino | litert"),
    ] = "savedmodel",
    dtype: Annotated[
        str | None, typer.Option(help="The source's if none")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 | int4")] = None,
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
    """Write what others serve: TensorFlow takes pictures and gives text."""
    from keras_paligemma.export import targets

    targets.check(target, format)
    # The backend that writes the format also reads the source.
    writer = targets.TARGETS.get(format)
    os.environ["KERAS_BACKEND"] = writer.backend if writer else "tensorflow"
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
