"""`keras-paligemma examples`: the pictures used in the documentation."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma import atomic
from keras_paligemma import shipped


def examples(
    folder: Annotated[
        Path, typer.Argument(help="Written to; created if missing")
    ] = Path("examples"),
) -> None:
    """Write the pictures of the documentation.

    With them and a few training lines, the code of its pages runs as it is
    printed, without a checkout.
    """
    folder = atomic.local(folder)
    for name in ("pictures", "words", "finetune"):
        source, target = shipped.folder("examples") / name, folder / name
        # In a checkout both folders may be the same.
        if target.resolve() != source.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)
        typer.echo(f"wrote {target}")
