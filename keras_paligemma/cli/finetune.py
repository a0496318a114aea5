"""`keras-paligemma finetune`: train on a data set or benchmark."""

from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import Masks
from keras_paligemma.cli.options import with_settings
from keras_paligemma.training import run
from keras_paligemma.training.settings import Settings
from keras_paligemma.training.settings import read_file
from keras_paligemma.training.settings import read_settings


@with_settings(Settings)
def finetune(
    given: dict,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the settings below")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Use this benchmark's settings and, if --data is a folder, "
            "its examples; see `benchmarks`"
        ),
    ] = None,
    masks: Masks = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop")
    ] = False,
) -> None:
    """Train on a data set; the same command resumes a killed run.

    Options override the file of settings, which overrides the benchmark's
    settings.
    """
    defaults, source = {}, None
    if benchmark is not None:
        from keras_paligemma.evaluation.finetuning import for_run

        defaults, source = for_run(benchmark, read_file(config) | given, masks)
    settings = read_settings(config, defaults, **given)
    encodes = getattr(source, "codec", None) is not None
    if masks is not None and not encodes:
        raise ValueError(
            "--masks is the codec of a folder of RefCOCO's, with --benchmark. "
            f"Received: --masks {masks} for other data. Expected, for a data "
            f"set of objects: --codec {masks}."
        )
    if settings.codec is not None and masks is None and encodes:
        raise ValueError(
            "A benchmark's masks have a codec of their own. Received: "
            f"codec={settings.codec!r}. Expected: --masks {settings.codec}."
        )
    with quiet_imports():
        from keras_paligemma.models import causal_lm  # noqa: F401
    run.finetune(settings, dry_run, source)
