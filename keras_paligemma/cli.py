"""The command line: `keras-paligemma inspect | convert | finetune | …`."""

import contextlib
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma import downloads
from keras_paligemma import presets
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.float_views import float_views
from keras_paligemma.checkpoints.held import hold
from keras_paligemma.checkpoints.safetensors_files import Headers
from keras_paligemma.distribution.command import plan
from keras_paligemma.export.command import export
from keras_paligemma.known_files import read_checked

app = typer.Typer(
    help="PaliGemma 2 for Keras 3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(export)
app.command()(plan)

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
    """Tell what a checkpoint is, and what is missing, from its headers.

    On a hub it stays there: of Hugging Face's safetensors the headers are
    read, of all else configuration and sizes.
    """
    fields = read_fields(set)
    if presets.published(source) and "://" not in source:
        checkpoint = formats.resolve(source, False, fields)
        handles = presets.describe(source)["handles"].values()
        facts = describe(checkpoint, empty_weights(checkpoint))
        show(facts | {"published at": ", ".join(handles)})
        return
    if "://" in source:
        sizes = downloads.sizes(source)
        checkpoint, has_headers = inspect_handle(source, sizes, fields)
    else:
        checkpoint, has_headers = formats.resolve(source, fields=fields), True
        sizes = {one.name: one.stat().st_size for one in checkpoint.files}
    weights = empty_weights(checkpoint) if checkpoint else {}
    facts = describe(checkpoint, weights) if checkpoint else {}
    if sizes:
        facts["files"] = len(sizes)
        facts["bytes"] = f"{sum(sizes.values()):,}"
    if not has_headers:
        facts |= {name: f"{size:,} bytes" for name, size in sizes.items()}
        show(facts)
        typer.echo("a download has the weights; they were not looked into")
        return
    with checkpoint.open() as tensors:
        listed = engine.problems(
            weights, checkpoint.rows_for(weights), tensors.shapes
        )
        dtypes = {}
        for key, dtype in tensors.dtypes.items():
            size = math.prod(tensors.shapes[key])
            dtypes[dtype] = dtypes.get(dtype, 0) + size
        facts["tensors"] = len(tensors.shapes)
    facts["values"] = ", ".join(f"{n:,} {dtype}" for dtype, n in dtypes.items())
    show(facts)
    if listed:
        typer.echo(f"{len(listed)} keys do not fit:", err=True)
        for problem in listed:
            typer.echo(f"  {problem}", err=True)
        raise typer.Exit(1)
    typer.echo("every weight is there, with the shape that it should have")


def inspect_handle(handle, sizes, fields):
    """Find what lies on a hub by its small files; nothing else is fetched.

    Args:
        handle: str.
        sizes: dict of its files' bytes by name.
        fields: dict, see `formats.find`.

    Returns:
        `formats.Checkpoint`, or `None` where the sizes of the model lie in
        the weights alone; and whether the tensors' headers are in it.
    """
    if any(".npz" in name for name in sizes) and not presets.published(handle):
        return None, False
    found = {}
    if any(name.endswith(".safetensors") for name in sizes):
        found = downloads.headers(handle)
    if not found:
        return formats.resolve(handle, False, fields), False
    folder = downloads.download(handle, weights=False)
    return formats.find(folder, fields, False, Headers(found)), True


def describe(checkpoint, weights):
    """List what a configuration says, as a dict of name to fact."""
    backbone = checkpoint.config["backbone"]
    facts = {
        "format": checkpoint.format or "known by its name",
        "variant": checkpoint.variant or "none of the published",
        "parameters": f"{engine.count(float_views(weights)):,}",
        "image size": backbone["image_size"],
        "tokenizer": checkpoint.tokenizer or "none beside it",
    }
    for tower in ("vision_encoder", "text_decoder"):
        facts[tower] = ", ".join(f"{k}={v}" for k, v in backbone[tower].items())
    return facts


def show(facts):
    """Print a dict, a line a fact."""
    for name, fact in facts.items():
        typer.echo(f"{name:>14}  {fact}")


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
        typer.echo(
            "No SentencePiece model is beside the source, so none is written "
            "(a tokenizer.json cannot stand for it). To have one, add "
            "--tokenizer paligemma_tokenizer.model, a path or a handle such "
            "as gs://big_vision/paligemma_tokenizer.model",
            err=True,
        )
    with checkpoint.open() as tensors, progress(weights, target) as read:
        held = hold(weights, checkpoint.rows_for(weights), tensors)
        exports.write(
            target,
            to,
            config,
            held,
            read,
            tokenizer_bytes(path),
            dtype=dtype,
            piece_size=piece_size,
        )
    count = engine.count(float_views(weights))
    typer.echo(f"{target}: {count:,} parameters as {to}")


@app.command()
def finetune(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of these settings")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="As `from_preset` takes it")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="JSONL file: image, prefix and suffix a line"),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run and its result")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Another JSONL file")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 1")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 8")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1e-4")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Default 8; 0 trains the weights")
    ] = None,
    lora_targets: Annotated[
        list[str] | None,
        typer.Option(help="decoder.attention, decoder, vision, all, …"),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 | int4")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other setting as TOML: label_smoothing=0.1, "
            "'freeze=[\"vision_encoder/*\"]'. May be repeated.",
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Settings and, where --data is a folder, examples of this "
            "benchmark; see `benchmarks`"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop")
    ] = False,
) -> None:
    """Train on a JSONL file; the same command goes on after a kill."""
    from keras_paligemma.training import run

    given = run.read_pairs(set)
    given |= {
        name: value
        for name, value in {
            "preset": preset,
            "data": data,
            "output": output,
            "validation": validation,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "lora_rank": lora_rank,
            "lora_targets": lora_targets,
            "quantize": quantize,
        }.items()
        if value is not None
    }
    defaults, source = {}, None
    if benchmark is not None:
        from keras_paligemma.evaluation.finetuning import for_run

        defaults, source = for_run(benchmark, run.read_file(config) | given)
    settings = run.read_settings(config, defaults, **given)
    run.finetune(settings, dry_run, source)


@contextlib.contextmanager
def progress(weights, target):
    """Show how much of the weights is written, where someone looks on.

    Args:
        weights: dict of all weights.
        target: path, which the bar names.

    Yields:
        Function that reads one weight and moves the bar by its bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import DownloadColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns.append(TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stdout.isatty(),
    )
    with bar:
        # The dtype is known with the first array.
        task = bar.add_task(target.name, total=None)

        def read(weight):
            array = weight.read()
            total = engine.count(weights) * array.dtype.itemsize
            bar.update(task, total=total, advance=array.nbytes)
            return array

        yield read


def tokenizer_bytes(path):
    """Read a SentencePiece model; Gemma's gets PaliGemma's pieces."""
    if path is None:
        return None
    from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer

    return PaliGemmaTokenizer(read_checked(path)).proto


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
