"""`keras-paligemma convert`: convert a checkpoint to another format."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.environment import use_any_backend
from keras_paligemma.cli.options import Set
from keras_paligemma.cli.options import Source
from keras_paligemma.cli.options import read_fields


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="Folder, or .npz file")],
    to: Annotated[
        str,
        typer.Option(help="keras | transformers | big_vision | keras_hub"),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 | bfloat16 | float16; default: source's"),
    ] = None,
    piece_size: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes per .npz piece, or shard of keras"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="SentencePiece model, if the source has none"),
    ] = None,
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Accept NaN and infinity"),
    ] = False,
    set: Set = None,
) -> None:
    """Convert a checkpoint to another format.

    The whole model is never in memory at once.
    """
    fields = read_fields(set)
    use_any_backend()
    with quiet_imports():
        from keras_paligemma.models import conversion

    checkpoint, weights = conversion.find(source, fields, tokenizer)
    for sentence in checkpoint.assumed.values():
        typer.echo(sentence, err=True)
    if checkpoint.tokenizer is None:
        typer.echo(
            "No SentencePiece model or tokenizer.json is beside the source, so "
            "none is written. To have one, add "
            "--tokenizer paligemma_tokenizer.model, a path or a handle such "
            "as gs://big_vision/paligemma_tokenizer.model",
            err=True,
        )
    with progress(weights, target) as show:
        count = conversion.write(
            checkpoint,
            weights,
            target,
            to,
            show,
            dtype,
            piece_size,
            allow_nonfinite,
        )
    typer.echo(f"{target}: {count:,} parameters as {to}")


@contextlib.contextmanager
def progress(weights, target):
    """Show a progress bar of the written weights if output is a terminal.

    Args:
        weights: dict of all weights.
        target: path, whose name the bar shows.

    Yields:
        Function to call with each array that was read; it advances the bar by
        the array's bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import DownloadColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeRemainingColumn

    from keras_paligemma.checkpoints import engine

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns.append(TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stdout.isatty(),
    )
    with bar:
        # The dtype is known when the first array is read.
        task = bar.add_task(target.name, total=None)

        def show(array):
            total = engine.count(weights) * array.dtype.itemsize
            bar.update(task, total=total, advance=array.nbytes)

        yield show
