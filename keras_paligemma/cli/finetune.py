"""`keras-paligemma finetune`: train on a data set."""

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import LoraTargets
from keras_paligemma.cli.options import Quantize


def finetune(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of these settings")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="As `from_preset` takes it")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSONL file: image, prefix and suffix a line; or objects as "
            "COCO, YOLO or Pascal VOC have them, a file or folder"
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of the run and its result")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Another such file or folder")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="detect | segment, of a data set of objects"),
    ] = None,
    allow_empty: Annotated[
        bool | None,
        typer.Option(
            "--allow-empty", help="Answers may be empty: nothing to detect"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default 1")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default 8")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1e-4")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Default 8; 0 trains the weights")
    ] = None,
    lora_targets: LoraTargets = None,
    quantize: Quantize = None,
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
    """Train on a data set; the same command goes on after a kill."""
    from keras_paligemma.training import run

    given = read_pairs(set)
    given |= {
        name: value
        for name, value in {
            "preset": preset,
            "data": data,
            "output": output,
            "validation": validation,
            "task": task,
            "allow_empty": allow_empty,
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
    with quiet_imports():
        from keras_paligemma.models import causal_lm  # noqa: F401
    run.finetune(settings, dry_run, source)


def read_pairs(pairs):
    """Turn ["label_smoothing=0.1"] into a dict, each value read as TOML."""
    given = {}
    for pair in pairs or ():
        try:
            given |= tomllib.loads(pair)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(
                "Expected: --set name=value, a string in quotes. Received: "
                f"{pair!r} ({error})."
            ) from error
    return given
