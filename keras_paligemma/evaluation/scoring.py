"""Compute a benchmark's metric from predictions and samples."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_paligemma import metrics
from keras_paligemma.evaluation.predictions import check_predictions
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.samples import Samples
from keras_paligemma.metrics.scores import Scores

# Ground truth columns of each metric; those in brackets may be missing.
COLUMNS = {
    "captions": ("references",),
    "cider": ("references",),
    "description_lengths": (),
    "music": ("scores",),
    "refcoco": ("boxes", "masks"),
    "relaxed_accuracy": ("answers", "[kinds]"),
    "rsvqa": ("answers", "question_types"),
    "science_qa": ("answers",),
    "smiles": ("molecules",),
    "tables": ("html",),
    "tallyqa": ("answers", "[simple]"),
    "text_detection": ("polygons", "texts", "sizes"),
    "vqa": ("answers",),
    "vqav2": ("answers", "[answer_types]"),
}


def score(
    benchmark: Benchmark,
    predictions: Mapping[str, str],
    samples: Samples,
    decode: Callable[..., Any] | None = None,
    judges: Mapping[str, Callable[..., Any]] | None = None,
) -> Scores:
    """Compute a benchmark's metric.

    Args:
        benchmark: `Benchmark`.
        predictions: dict of ids to texts.
        samples: `Samples`, whose order is that of the rows.
        decode: function of mask codes to masks, required by RefCOCO's metric.
        judges: dict of value names to judges, see `metrics.judged`.

    Returns:
        `Scores`, whose values are not yet multiplied by `benchmark.scale`.

    Raises:
        ValueError: predictions and samples do not match, or reference answers
            are missing; the message lists ids.

    Example:

    ```python
    scores = score(benchmark, read_predictions("predictions.jsonl"), samples)
    scores.values()["acc"]
    ```
    """
    check_predictions(predictions, samples.ids)
    texts = [predictions[id] for id in samples.ids]
    columns, groups = truth_columns(benchmark, samples, decode)
    arguments = dict(benchmark.arguments)
    if benchmark.metric == "refcoco":
        arguments["decode"] = decode
    function = getattr(metrics, benchmark.metric)
    if groups is None:
        scores = function(texts, **columns, **arguments)
    else:
        scores = _averaged(function, texts, columns, arguments, groups)
    for name in benchmark.judges:
        if judges and name in judges:
            judged = metrics.judged(name, texts, _any(columns), judges[name])
            scores = _joined(scores, judged)
    return scores


def truth_columns(
    benchmark: Benchmark,
    samples: Samples,
    decode: Callable[..., Any] | None = None,
) -> tuple[dict[str, Any], list[Any] | None]:
    """Collect the ground truth that a metric compares with.

    Args:
        benchmark, samples, decode: as `score` takes them.

    Returns:
        Tuple of a dict of the metric's columns, and a list of each row's
        group, or `None` if no mean over groups is reported.

    Raises:
        ValueError: reference answers are missing, with the ids; or the metric
            needs `decode`.
    """
    if benchmark.metric == "refcoco" and decode is None:
        raise ValueError(
            f"{benchmark.name} compares masks. Expected: `decode`, a function "
            "of 16 codes a row to masks of 64 by 64. Received: None."
        )
    rows = [samples.truth(row) for row in range(len(samples))]
    columns = {}
    for name in COLUMNS[benchmark.metric]:
        needed = not name.startswith("[")
        name = name.strip("[]")
        values = [row.get(name) for row in rows]
        missing = [
            id
            for id, value in zip(samples.ids, values, strict=True)
            if value is None or (isinstance(value, list) and not value)
        ]
        if not needed and missing:
            continue
        if name in ("polygons", "texts"):
            missing = [
                i for i, v in zip(samples.ids, values, strict=True) if v is None
            ]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(samples)} samples of "
                f"{benchmark.name} have no right {name!r}, such as those of a "
                f"test split that is kept back. Received: ids {missing[:5]}."
            )
        if name == "references":
            values = [[v] if isinstance(v, str) else v for v in values]
        columns[name] = values
    return columns, _groups(benchmark, samples, rows)


def _groups(benchmark, samples, rows):
    field = benchmark.average_over
    if field is None:
        return None
    groups = [row.get(field) for row in rows]
    if None in groups:
        raise ValueError(
            f"{benchmark.name} is a mean over each {field!r}, which samples "
            f"lack. Received: id {samples.ids[groups.index(None)]!r} without."
        )
    return groups


def _averaged(function, texts, columns, arguments, groups):
    """Compute a metric for each group, and the mean over groups."""
    rows = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    parts, quality = {}, np.full(len(texts), np.nan)
    for group, here in rows.items():
        part = function(
            [texts[row] for row in here],
            **{
                name: [values[row] for row in here]
                for name, values in columns.items()
            },
            **arguments,
        )
        parts[group] = part
        first = next(iter(part.columns.values()))
        quality[here] = first if part.quality is None else part.quality
    spread = {}
    for group, part in parts.items():
        for name, values in part.columns.items():
            column = np.full(len(texts), np.nan)
            column[rows[group]] = values
            spread[group, name] = column

    def combine(means, count):
        values = {}
        for group, part in parts.items():
            own = {n: means[g, n] for g, n in spread if g == group}
            if part.combine is not None:
                own = part.combine(own, len(part))
            for name, value in own.items():
                values.setdefault(name, []).append(value)
                values[f"{name}/{group}"] = value
        return {
            name: _mean(value) if isinstance(value, list) else value
            for name, value in values.items()
        }

    return Scores(spread, combine, quality)


def _mean(values):
    """Average over groups; a bootstrap draw may lack a small group."""
    values = np.stack(values)
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(axis=0)
    count = there.sum(axis=0)
    return np.divide(
        total, count, out=np.full(count.shape, np.nan), where=count > 0
    )


def _joined(scores, other):
    """Join the columns of two metrics of the same rows."""

    def combine(means, count):
        own = {name: means[name] for name in scores.columns}
        if scores.combine is not None:
            own = scores.combine(own, count)
        return own | {name: means[name] for name in other.columns}

    quality = scores.quality
    if quality is None:
        quality = next(iter(scores.columns.values()))
    return Scores({**scores.columns, **other.columns}, combine, quality)


def _any(columns):
    return next(iter(columns.values()), None)
