"""`keras-paligemma evaluate`: a benchmark of the model card."""

from typing import Annotated

import typer


def evaluate(
    preset: Annotated[str, typer.Option(help="As `from_preset` takes it")],
    benchmark: Annotated[
        str, typer.Option(help="A name that `benchmarks` lists")
    ],
    data: Annotated[str, typer.Option(help="Folder of the data")],
    output: Annotated[
        str | None, typer.Option(help="Folder; evaluation-BENCHMARK if none")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many of the first samples")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of this host")] = 8,
    split: Annotated[
        str | None, typer.Option(help="Another than the card's")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of a PEFT adapter")
    ] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 | int4")] = None,
) -> None:
    """Run a benchmark of the model card; the same command resumes a run."""
    from keras_paligemma.evaluation.registry import find_benchmark
    from keras_paligemma.evaluation.sources import open_samples

    # Before anything is loaded: a typo takes no minutes.
    record = find_benchmark(benchmark)
    samples = open_samples(record, data, split)
    import keras

    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma import compat
    from keras_paligemma.evaluation.run import evaluate as run

    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        if len(devices) > 1 and keras.distribution.distribution() is None:
            every = keras.distribution.DataParallel(devices=devices)
            keras.distribution.set_distribution(every)
    chosen = {"dtype": dtype, "quantize": quantize}
    model = PaliGemmaCausalLM.from_preset(
        preset,
        prompt_length=record.text_length,
        response_length=record.text_length,
        # As the original cuts it.
        on_long_prompt="truncate",
        **{name: one for name, one in chosen.items() if one is not None},
    )
    if adapter is not None:
        model.load_adapter(adapter)
    result = run(
        model,
        record,
        samples,
        output or f"evaluation-{record.name}",
        batch_size=batch_size,
        limit=limit,
        shard=compat.process(),
    )
    if result is not None:
        typer.echo(result)
        typer.echo(f"  {result.output / 'report.html'}")
