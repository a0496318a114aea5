"""The command line: `keras-paligemma inspect | convert | finetune | …`.

Each command is a function in a module of its name, added to `app` below. Until
a command runs, only typer is imported, so help and completion are fast and no
command loads what another needs.
"""

import os
import sys
from typing import Annotated

import typer

import keras_paligemma
from keras_paligemma.cli import benchmarks
from keras_paligemma.cli import convert
from keras_paligemma.cli import data
from keras_paligemma.cli import evaluate
from keras_paligemma.cli import examples
from keras_paligemma.cli import export
from keras_paligemma.cli import finetune
from keras_paligemma.cli import generate
from keras_paligemma.cli import inspect
from keras_paligemma.cli import plan
from keras_paligemma.cli import serve
from keras_paligemma.cli.environment import command_environment

# The exit status after Ctrl-C, which typer turns into a `SystemExit`.
INTERRUPTED = 130

app = typer.Typer(
    help="PaliGemma 2 for Keras 3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Importing rich would double the start time.
)
app.command()(inspect.inspect)
app.command()(convert.convert)
app.command()(generate.generate)
app.command()(finetune.finetune)
app.command()(plan.plan)
app.command()(export.export)
app.command()(evaluate.evaluate)
app.command()(benchmarks.benchmarks)
app.add_typer(data.data, name="data")
app.command()(serve.serve)
app.command()(examples.examples)


def main():
    """Run the command line; print errors that users can fix, no traceback."""
    with command_environment():
        try:
            app()
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise SystemExit(1) from error
        except SystemExit as end:
            if end.code == INTERRUPTED:
                # XLA may still compute a step, and would crash if Python
                # ended under it.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(INTERRUPTED)
            raise


def show_version(wanted: bool):
    """Print the version and stop."""
    if wanted:
        typer.echo(f"keras_paligemma {keras_paligemma.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """PaliGemma 2 for Keras 3."""
