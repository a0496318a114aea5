"""`keras-paligemma plan`: plan a job before chips are rented."""

import os
import sys
from json import dumps
from typing import Annotated
from typing import Any

import typer

from keras_paligemma.cli.options import CacheDtype
from keras_paligemma.cli.options import LoraTargets
from keras_paligemma.cli.options import Preset
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import given


def plan(
    preset: Preset,
    slice: Annotated[
        str, typer.Option(help="v5e-1, v5e-4, v5e-8, …; a100-40, l4x4, …")
    ] = "v5e-8",
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step, over all chips")
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(help="Tokens; 64 if not given")
    ] = None,
    response_length: Annotated[
        int | None, typer.Option(help="Tokens; 64 if not given")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(help="Pictures or frames per prompt")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Of adapters")] = None,
    lora_targets: LoraTargets = None,
    quantize: Quantize = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights")
    ] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Use this benchmark's batch, lengths and pictures; see "
            "`benchmarks`"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype policy; bfloat16 if not given")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help='Only layout to try, such as "weights 1x8"'),
    ] = None,
    remat: Annotated[
        str | None,
        typer.Option(help="Only remat to try: none | dots | block | pair"),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Plan generation, not training")
    ] = False,
    cache_dtype: CacheDtype = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Do not use the compiler")
    ] = False,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Find whether and how a job fits on chips, before they are rented.

    Options that are not given default to the benchmark's settings, or those of
    `planning.Job`.
    """
    use_jax()
    from keras_paligemma.planning import Job
    from keras_paligemma.planning import make_plan

    if cache_dtype and not generate:
        raise ValueError(
            f"Training has no cache. Received: --cache-dtype {cache_dtype}. "
            "Expected: --generate with it."
        )
    if generate and full:
        raise ValueError("Received: --generate and --full. Expected: one.")
    if full and (lora_rank or lora_targets):
        raise ValueError(
            "A full fine-tune has no adapters. Received: --full and "
            "--lora-rank or --lora-targets. Expected: one."
        )
    settings = {} if benchmark is None else _settings_of(benchmark)
    settings |= given(
        batch_size=batch_size,
        prompt_length=prompt_length,
        response_length=response_length,
        pictures=pictures,
        lora_rank=0 if full else lora_rank,
        lora_targets=tuple(lora_targets) if lora_targets else None,
        quantize=quantize,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    found = make_plan(
        Job(preset, **settings),
        slice,
        layout,
        remat or "any",
        compiler=False if estimate else None,
        generate=generate,
    )
    typer.echo(dumps(found.to_dict()) if json else found)


def _settings_of(benchmark) -> dict[str, Any]:
    """Return the fields of a `Job` that a benchmark sets."""
    from keras_paligemma.evaluation import find_benchmark
    from keras_paligemma.evaluation import settings_of

    record = find_benchmark(benchmark)
    # Either resolution: these settings are the same for both.
    found = settings_of(record, 448)
    names = ("batch_size", "prompt_length", "response_length", "lora_rank")
    settings = {name: found[name] for name in names if name in found}
    return settings | {"pictures": record.pictures_of_a_prompt}


def use_jax():
    """Use JAX, whose step is planned, on the CPU.

    Keras chooses its backend on import; if that is another one, the command is
    started again.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "jax"
    import keras

    if keras.backend.backend() != "jax":
        os.environ["KERAS_BACKEND"] = "jax"
        command = [sys.executable, "-m", "keras_paligemma", *sys.argv[1:]]
        os.execv(sys.executable, command)
    import jax

    jax.config.update("jax_platforms", "cpu")
