"""The command line: `keras-paligemma inspect | convert`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma import presets
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.float_views import float_views

app = typer.Typer(
    help="PaliGemma 2 for Keras 3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[
    str,
    typer.Argument(
        help="Preset name, folder, .npz file or its pieces, or a handle: "
        "hf://…, kaggle://…, gs://…"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field that the files do not tell: "
        "query_pre_attention_scalar=256. May be repeated.",
    ),
]


def main():
    """Run the command line; what a user can mend is told without a trace."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(1) from error


@app.command()
def inspect(source: Source, set: Set = None) -> None:
    """Tell what a checkpoint is, and what is missing, from its headers."""
    checkpoint = formats.resolve(source, fields=read_fields(set))
    with checkpoint.open() as tensors:
        weights = empty_weights(checkpoint)
        listed = engine.problems(
            weights, checkpoint.rows_for(weights), tensors.shapes
        )
        dtypes = {}
        for key, dtype in tensors.dtypes.items():
            size = math.prod(tensors.shapes[key])
            dtypes[dtype] = dtypes.get(dtype, 0) + size
    backbone = checkpoint.config["backbone"]
    facts = {
        "format": checkpoint.format,
        "variant": checkpoint.variant or "none of the published",
        "files": len(checkpoint.files),
        "bytes": f"{sum(one.stat().st_size for one in checkpoint.files):,}",
        "tensors": len(tensors.shapes),
        "values": ", ".join(f"{n:,} {dtype}" for dtype, n in dtypes.items()),
        "parameters": f"{engine.count(float_views(weights)):,}",
        "image size": backbone["image_size"],
        "tokenizer": checkpoint.tokenizer or "none beside it",
    }
    for tower in ("vision_encoder", "text_decoder"):
        facts[tower] = ", ".join(f"{k}={v}" for k, v in backbone[tower].items())
    for name, fact in facts.items():
        typer.echo(f"{name:>14}  {fact}")
    if listed:
        typer.echo(f"{len(listed)} keys do not fit:", err=True)
        for problem in listed:
            typer.echo(f"  {problem}", err=True)
        raise typer.Exit(1)
    typer.echo("every weight is there, with the shape that it should have")


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder, or file X.npz")],
    to: Annotated[str, typer.Option(help=" | ".join(formats.FORMATS))],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 | bfloat16 | float16; the source's if none"),
    ] = None,
    piece_size: Annotated[
        int | None, typer.Option(help="Bytes of a piece of a .npz")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="SentencePiece model, if none is beside the source"),
    ] = None,
    set: Set = None,
) -> None:
    """Write a checkpoint in another format; its model is never in memory."""
    from keras_paligemma.models import exports

    checkpoint = formats.resolve(source, fields=read_fields(set))
    path = presets.locate(tokenizer) if tokenizer else checkpoint.tokenizer
    weights = empty_weights(checkpoint)
    config = dict(checkpoint.config)
    if path is None:
        config["preprocessor"] = None
    with checkpoint.open() as tensors:
        held = engine.hold(weights, checkpoint.rows_for(weights), tensors)
        exports.write(
            target,
            to,
            config,
            held,
            engine.Held.read,
            path.read_bytes() if path else None,
            dtype=dtype,
            piece_size=piece_size,
        )
    count = engine.count(float_views(weights))
    typer.echo(f"{target}: {count:,} parameters as {to}")


def empty_weights(checkpoint):
    """Name and shape all weights of a checkpoint's model, without values."""
    from keras_paligemma.compat import without_values
    from keras_paligemma.models.backbone import PaliGemmaBackbone

    with without_values():
        backbone = PaliGemmaBackbone(**checkpoint.config["backbone"])
    return backbone.weights_by_name()


def read_fields(pairs):
    """Turn ["final_logit_soft_cap=none"] into a dict of numbers."""
    fields = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        try:
            words = {"none": None, "true": True, "false": False}
            value = (
                words[text.lower()] if text.lower() in words else float(text)
            )
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(
                "Expected: --set name=number, or name=none. Received: "
                f"{pair!r}."
            )
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fields[key] = value
    return fields


if __name__ == "__main__":
    main()
