"""A benchmark run: predict, survive a kill, score, report."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from keras_paligemma import compat
from keras_paligemma.evaluation.codecs import SIZES
from keras_paligemma.evaluation.codecs import mask_codec
from keras_paligemma.evaluation.predicting import predict
from keras_paligemma.evaluation.predictions import read_predictions
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.registry import find_benchmark
from keras_paligemma.evaluation.report import write_report
from keras_paligemma.evaluation.scoring import score
from keras_paligemma.evaluation.scoring import truth_columns
from keras_paligemma.evaluation.sources import open_samples
from keras_paligemma.metrics.judges import JUDGES

PREDICTIONS = "predictions.jsonl"
# Values of a weight that the fingerprint of a model takes in.
_SMALL = 2**20


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a run found.

    Args:
        benchmark: `Benchmark`.
        samples: int, how many.
        values: dict of a value to ours, on the card's scale.
        intervals: dict of a value to (low, high), 95 % of a bootstrap.
        card: dict of a value to the card's number, of those that it has.
        column: str, the card's column, or `None` of a model that is not in it.
        limited: bool, whether only the first samples were taken.
        output: `pathlib.Path` of the folder with predictions and report.
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
        """Name the card's values for which there was no judge."""
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

    Predictions go to `output`/predictions.jsonl batch by batch, in the order
    of the samples, and are on the disk before the next batch begins. The same
    call goes on where a killed one stopped. At the end `output`/results.json
    and `output`/report.html are written.

    Where a distribution of `keras.distribution` is active, a batch's rows are
    split over its devices. Several hosts write a file each, into a folder that
    all see; the first puts them together.

    Args:
        model: `PaliGemmaCausalLM`, fine-tuned for the benchmark: the card's
            numbers are of such models.
        benchmark: name of `benchmarks()`, or a `Benchmark`.
        source: folder or data set, as `open_samples` takes it.
        output: folder of this run.
        batch_size: int, prompts at a time, of this host.
        limit: int, only so many of the first samples.
        split: str, another than the benchmark's.
        decode: function of mask codes to masks, for RefCOCO; `None` that of
            the embedded codec, where the model is not of a published size.
        judges: dict of a value to its judge, see `metrics.judged`.
        shard: (index, count) of this host's part of each batch, such as
            `distribution.data_shard()` gives.
        worst: int, answers that the report shows.
        progress: bool, show a bar where someone looks on.

    Returns:
        `Evaluation`; on hosts other than the first `None`.

    Raises:
        ValueError: what is wrong with data or output, with ids, before
            anything is predicted; an `ExampleError` of a picture that cannot
            be read, when its batch comes.

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
    output = Path(output)
    on_card = split in (None, benchmark.split)
    benchmark = benchmark if on_card else replace(benchmark, split=split)
    _keep_settings(output, benchmark, samples, model)
    path = output / PREDICTIONS
    predict(model, benchmark, samples, path, batch_size, shard, progress)
    if compat.process()[0]:
        return None
    predictions = read_predictions(path)
    scores = score(benchmark, predictions, samples, decode, judges)
    column = card_column(model)
    scale = benchmark.scale
    result = Evaluation(
        benchmark,
        len(samples),
        {name: scale * one for name, one in scores.values().items()},
        {
            name: (scale * low, scale * high)
            for name, (low, high) in scores.intervals().items()
        },
        benchmark.card_numbers(column) if on_card else {},
        column,
        len(samples) < whole,
        output,
    )
    write_report(result, samples, predictions, scores.worst(worst))
    return result


def card_column(model: Any) -> str | None:
    """Name the card's column of a model, "448-3B", or `None` of another."""
    backbone = model.backbone
    size = SIZES.get(backbone.text_config.hidden_dim)
    if size is None or backbone.image_size not in (224, 448):
        return None
    return f"{backbone.image_size}-{size}"


def _check_data(benchmark, samples, decode):
    """Say all that is wrong with the data before an hour of predictions."""
    missing = samples.missing_pictures()
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(samples)} samples of {benchmark.name} "
            f"have no picture at their path. Received: ids {missing[:5]} in "
            f"{samples.place}. Unpack all of {benchmark.data}."
        )
    truth_columns(benchmark, samples, decode)


def fingerprint(model: Any) -> str:
    """Tell two models apart by their small weights: norms, biases, adapters.

    No training leaves all of these as they were, and of a 28b model they are
    megabytes. Every process must ask, since shards are gathered.

    Args:
        model: `PaliGemmaCausalLM`.

    Returns:
        str, a hash in hexadecimal.
    """
    found = hashlib.sha256()
    for variable in model.backbone.weights:
        if math.prod(variable.shape) <= _SMALL:
            values = compat.to_host(variable).astype("float32")
            found.update(values.tobytes())
    return found.hexdigest()


def _keep_settings(output, benchmark, samples, model):
    """Write what the run is, or refuse a folder that holds another one."""
    listed = hashlib.sha256("\n".join(samples.ids).encode()).hexdigest()
    here = {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "samples": len(samples),
        "ids_sha256": listed,
        "beams": benchmark.beams,
        "max_new_tokens": benchmark.text_length,
        "image_size": model.backbone.image_size,
        "model_sha256": fingerprint(model),
    }
    path = output / "settings.json"
    if path.is_file():
        there = json.loads(path.read_text("utf-8"))
        changed = {
            name: (there.get(name), value)
            for name, value in here.items()
            if there.get(name) != value
        }
        if changed:
            raise ValueError(
                f"{output} holds an evaluation of another kind. Received "
                f"(there, now): {changed}. Choose another output."
            )
    output.mkdir(parents=True, exist_ok=True)
    if compat.process()[0]:
        return
    draft = output / ".settings.json"
    draft.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
