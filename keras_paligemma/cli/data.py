"""`keras-paligemma data convert`: convert detection and mask data sets."""

from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.options import Codec
from keras_paligemma.cli.options import read_codec

data = typer.Typer(help="Data sets of objects.", no_args_is_help=True)

# Number of messages about skipped objects to show.
_SHOWN = 10


@data.callback()
def group() -> None:
    """Data sets of objects."""


@data.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="COCO JSON, YOLO's data.yaml or classes.txt, JSONL, or a "
            "folder of one of these or of Pascal VOC's XML"
        ),
    ],
    target: Annotated[
        Path, typer.Argument(help="New file, or a new or empty folder")
    ],
    to: Annotated[str, typer.Option(help="coco | yolo | voc | jsonl")],
    task: Annotated[
        str | None,
        typer.Option(
            help="To YOLO and JSONL, detect writes boxes, segment writes "
            "masks; default: masks if all objects have one"
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures, if not found")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split, if the source has several")
    ] = "train",
    codec: Codec = None,
) -> None:
    """Convert a data set to another format, and report what is lost."""
    from keras_paligemma.data import convert as convert_objects

    loaded = read_codec(codec)
    made = convert_objects(source, target, to, images, split, task, loaded)
    typer.echo(
        f"{made.path}: {made.pictures:,} pictures, {made.objects:,} objects"
    )
    for what, number in made.lost.items():
        typer.echo(f"lost: {what}: {number:,}")
    for line in made.skipped[:_SHOWN]:
        typer.echo(f"skipped: {line}")
    if len(made.skipped) > _SHOWN:
        typer.echo(f"skipped: {len(made.skipped) - _SHOWN:,} more")
