"""`keras-paligemma examples`: the pictures that the documentation asks about."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma import shipped


def examples(
    folder: Annotated[
        Path, typer.Argument(help="Written to; created if missing")
    ] = Path("examples"),
) -> None:
    """Write the pictures and training lines that the documentation uses.

    The code on its pages then runs as it is printed, without a checkout.
    """
    for name in ("pictures", "finetune"):
        source, target = shipped.folder("examples") / name, folder / name
        # In a checkout the two may be the same.
        if target.resolve() != source.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)
        typer.echo(f"wrote {target}")
