"""`keras-paligemma evaluate`: run a benchmark of the model card."""

from typing import Annotated

import typer

from keras_paligemma.cli.environment import data_parallel
from keras_paligemma.cli.options import Adapter
from keras_paligemma.cli.options import Dtype
from keras_paligemma.cli.options import Masks
from keras_paligemma.cli.options import MultiHost
from keras_paligemma.cli.options import Preset
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import given


def evaluate(
    preset: Preset,
    benchmark: Annotated[
        str, typer.Option(help="Name, as `benchmarks` lists it")
    ],
    data: Annotated[str, typer.Option(help="Folder of the data")],
    output: Annotated[
        str | None, typer.Option(help="Folder; default: evaluation-BENCHMARK")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only the first samples")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts per batch on this host")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split; default: the card's")
    ] = None,
    masks: Masks = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    multi_host: MultiHost = False,
) -> None:
    """Run a benchmark of the model card; the same command resumes a run."""
    from keras_paligemma.checkpoints import formats
    from keras_paligemma.evaluation.registry import find_benchmark
    from keras_paligemma.evaluation.sources import open_samples
    from keras_paligemma.tasks.published_codecs import mask_codec

    # Before the model is loaded, so that a typo fails at once.
    record = find_benchmark(benchmark)
    samples = open_samples(record, data, split)
    decode = None
    if record.metric == "refcoco":
        text = formats.resolve(preset, False).config.backbone.text_decoder
        decode = mask_codec(text.hidden_dim, masks).decode
    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma import compat
    from keras_paligemma.evaluation.run import evaluate as run

    data_parallel(multi_host)
    model = PaliGemmaCausalLM.from_preset(
        preset,
        prompt_length=record.text_length,
        response_length=record.text_length,
        # As in the original.
        on_long_prompt="truncate",
        **given(dtype=dtype, quantize=quantize),
    )
    if adapter is not None:
        model.load_adapter(adapter)
    result = run(
        model,
        record,
        samples,
        output or f"evaluation-{record.name}",
        decode=decode,
        shard=compat.process(),
        **given(batch_size=batch_size, limit=limit),
    )
    if result is not None:
        typer.echo(result)
        typer.echo(f"  {result.output / 'report.html'}")
