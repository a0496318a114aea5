"""`keras-paligemma generate`: answer prompts about many pictures."""

from pathlib import Path
from typing import Annotated

import typer

from keras_paligemma import atomic
from keras_paligemma.cli.environment import data_parallel
from keras_paligemma.cli.environment import quiet_imports
from keras_paligemma.cli.options import Adapter
from keras_paligemma.cli.options import CacheDtype
from keras_paligemma.cli.options import Dtype
from keras_paligemma.cli.options import MultiHost
from keras_paligemma.cli.options import Preset
from keras_paligemma.cli.options import Quantize
from keras_paligemma.cli.options import given


def generate(
    preset: Preset,
    data: Annotated[
        str,
        typer.Option(
            help="Folder of pictures, or JSONL file with an image and, "
            "optionally, a prefix and id per line"
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="JSONL file: id and prediction per line")
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Prompt of all pictures without prefix")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures per batch on this host")
    ] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens")
    ] = None,
    beams: Annotated[
        int, typer.Option(help="Beams of the search; 1 decodes greedily")
    ] = 1,
    adapter: Adapter = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    cache_dtype: CacheDtype = None,
    multi_host: MultiHost = False,
) -> None:
    """Answer prompts about many pictures; the same command resumes a run.

    The exit status is 1 if no picture could be answered.
    """
    from keras_paligemma.evaluation.answer_file import answer_file
    from keras_paligemma.evaluation.answer_file import open_pictures
    from keras_paligemma.evaluation.unread import errors_path

    # Before the model is loaded, so that a typo fails at once.
    output = atomic.local(output)
    pictures = open_pictures(data, prompt)
    with quiet_imports():
        from keras_paligemma import compat
        from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
    data_parallel(multi_host)
    model = PaliGemmaCausalLM.from_preset(
        preset, **given(dtype=dtype, quantize=quantize)
    )
    if adapter is not None:
        model.load_adapter(adapter)
    answer_file(
        model,
        pictures,
        output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        shard=compat.process(),
        beams=None if beams == 1 else beams,
        cache_dtype=cache_dtype,
    )
    listed = errors_path(output)
    # Those of earlier calls too, which this one has not read again.
    unread = len(listed.read_bytes().splitlines()) if listed.is_file() else 0
    typer.echo(f"{len(pictures) - unread} of {len(pictures)} in {output}")
    if unread == len(pictures):
        raise typer.Exit(1)
