"""`keras-paligemma inspect`: describe a checkpoint, from its headers."""

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.environment import use_any_backend
from keras_paligemma.cli.options import Set
from keras_paligemma.cli.options import Source
from keras_paligemma.cli.options import read_fields


def inspect(source: Source, set: Set = None) -> None:
    """Describe a checkpoint and list problems, from its headers.

    A checkpoint on a hub is not downloaded: of Hugging Face's safetensors only
    the headers are read, of others only configuration and sizes.
    """
    fields = read_fields(set)
    use_any_backend()
    with quiet_imports():
        from keras_paligemma.models import inspection

    found = inspection.inspect(source, fields)
    for name, fact in found.facts.items():
        typer.echo(f"{name:>14}  {fact}")
    if found.problems is None:
        typer.echo("a download has the weights; they were not looked into")
    elif found.problems:
        typer.echo(f"{len(found.problems)} keys do not fit:", err=True)
        for problem in found.problems:
            typer.echo(f"  {problem}", err=True)
        raise typer.Exit(1)
    else:
        typer.echo("every weight is there, with the shape that it should have")
