"""Run a benchmark: predict, resume if killed, score, report."""

import os
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

from keras_paligemma import atomic
from keras_paligemma import compat
from keras_paligemma.evaluation.predicting import predict
from keras_paligemma.evaluation.predictions import read_predictions
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.registry import find_benchmark
from keras_paligemma.evaluation.report import write_report
from keras_paligemma.evaluation.run_folder import claim_folder
from keras_paligemma.evaluation.run_folder import record_of
from keras_paligemma.evaluation.scoring import check_truth
from keras_paligemma.evaluation.scoring import score
from keras_paligemma.evaluation.sources import open_samples
from keras_paligemma.metrics.judges import JUDGES
from keras_paligemma.tasks.published_codecs import SIZES
from keras_paligemma.tasks.published_codecs import mask_codec

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """The result of a run.

    Args:
        benchmark: `Benchmark`.
        samples: int, number of samples.
        values: dict of names to floats, on the card's scale.
        intervals: dict of names to (low, high), 95 % bootstrap intervals.
        card: dict of names to the card's numbers, where it has them.
        column: str, the model's column of the card, or `None`.
        limited: bool, whether only the first samples were used.
        output: `pathlib.Path`, folder of predictions and report.
    """

    benchmark: Benchmark
    samples: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    card: Mapping[str, float]
    column: str | None
    limited: bool
    output: Path

    @property
    def unjudged(self) -> list[str]:
        """Return the names of the card's values that no judge has scored."""
        return [n for n in self.benchmark.judges if n not in self.values]

    def __str__(self):
        own = self.benchmark.value
        lines = [f"{self.benchmark.title}, {self.samples:,} samples"]
        for name, value in self.values.items():
            if name != own and name not in self.benchmark.card:
                continue
            low, high = self.intervals[name]
            line = f"  {name:<16} {value:8.2f}  ({low:.2f} to {high:.2f})"
            if name in self.card:
                line += f"   card, {self.column}: {self.card[name]:g}"
            lines.append(line)
        for name in self.unjudged:
            lines.append(f"  {name:<16} needs a judge, {JUDGES[name]}")
        if own not in self.values:
            lines.append(f"  no sample counts for {own}")
        if self.limited:
            lines.append("  of the first samples alone: not the card's split")
        return "\n".join(lines)


def evaluate(
    model: Any,
    benchmark: str | Benchmark,
    source: Any,
    output: str | os.PathLike[str] = "evaluation",
    *,
    batch_size: int = 8,
    limit: int | None = None,
    split: str | None = None,
    decode: Callable[..., Any] | None = None,
    judges: Mapping[str, Callable[..., Any]] | None = None,
    shard: tuple[int, int] = (0, 1),
    worst: int = 12,
    progress: bool = True,
) -> Evaluation | None:
    """Run a benchmark of the model card.

    Predictions are appended to `output`/predictions.jsonl batch by batch, in
    the order of the samples, and are on the disk before the next batch starts.
    The same call resumes a killed run: `output` records the model, the
    settings, and the path and prompt of each sample, and a call that differs
    in them is refused. The contents of picture files are not compared. At the
    end, `output`/results.json and `output`/report.html are written.

    If a `keras.distribution` is active, each batch is split over its devices.
    With several hosts, each writes a file of its own into `output`, which all
    must share; the first host merges them.

    Args:
        model: `PaliGemmaCausalLM`, fine-tuned for the benchmark: the card's
            numbers are of such models.
        benchmark: str, name in `benchmarks()`, or a `Benchmark`.
        source: folder or data set, as `open_samples` takes it.
        output: path, folder of this run.
        batch_size: int, prompts per batch on this host.
        limit: int, use only the first `limit` samples.
        split: str, split to use instead of the benchmark's, of a source that
            has several.
        decode: function of mask codes to masks, for RefCOCO; `None` takes the
            embedded codec's, unless the model is of a published size.
        judges: dict of value names to judges, see `metrics.judged`.
        shard: tuple (index, count), this host's part of each batch, such as
            `sharding.data_shard()` returns.
        worst: int, number of answers in the report.
        progress: bool, whether to show a bar if standard error is a terminal.

    Returns:
        `Evaluation`; `None` on all hosts but the first.

    Raises:
        ValueError: data or output are not usable, before anything is
            predicted; the message lists ids.
        ExampleError: a picture cannot be read, when its batch is predicted.

    Example:

    ```python
    result = evaluate(model, "textvqa", "TextVQA", "runs/textvqa", limit=100)
    print(result)
    ```
    """
    benchmark = find_benchmark(benchmark)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(
            "`batch_size` and `limit` are at least 1. Received: "
            f"batch_size={batch_size}, limit={limit}."
        )
    if decode is None and benchmark.metric == "refcoco":
        decode = mask_codec(model.backbone.text_config.hidden_dim).decode
    samples = open_samples(benchmark, source, split)
    whole = len(samples)
    samples = samples if limit is None else samples.first(limit)
    _check_data(benchmark, samples, decode)
    output = atomic.local(output)
    opened = samples.benchmark.split
    on_card = opened == benchmark.split
    benchmark = replace(benchmark, split=opened)
    record = record_of(benchmark, samples, model)
    claim_folder(output, record.settings)
    path = output / PREDICTIONS
    options = {"max_new_tokens": benchmark.text_length}
    if benchmark.beams > 1:
        options["beams"] = benchmark.beams
    predict(
        model,
        benchmark.name,
        options,
        samples,
        path,
        record,
        batch_size=batch_size,
        shard=shard,
        progress=progress,
    )
    if compat.process()[0]:
        return None
    predictions = read_predictions(path)
    scores = score(benchmark, predictions, samples, decode, judges)
    column = card_column(model)
    scale = benchmark.scale
    result = Evaluation(
        benchmark=benchmark,
        samples=len(samples),
        values={name: scale * value for name, value in scores.values().items()},
        intervals={
            name: (scale * low, scale * high)
            for name, (low, high) in scores.intervals().items()
        },
        card=benchmark.card_numbers(column) if on_card else {},
        column=column,
        limited=len(samples) < whole,
        output=output,
    )
    write_report(result, samples, predictions, scores.worst(worst))
    return result


def card_column(model: Any) -> str | None:
    """Return the card's column of a model, such as "448-3B", or `None`."""
    backbone = model.backbone
    size = SIZES.get(backbone.text_config.hidden_dim)
    if size is None or backbone.image_size not in (224, 448):
        return None
    return f"{backbone.image_size}-{size}"


def _check_data(benchmark, samples, decode):
    """Raise for what cannot be scored before anything is predicted."""
    missing = samples.missing_pictures()
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(samples)} samples of {benchmark.name} "
            f"have no picture at their path. Received: ids {missing[:5]} in "
            f"{samples.place}. Unpack all of {benchmark.data}."
        )
    check_truth(benchmark, samples, decode)
