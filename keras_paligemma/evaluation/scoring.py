"""Compute a benchmark's metric from predictions and samples."""

import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_paligemma import metrics
from keras_paligemma.evaluation.predictions import check_predictions
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.samples import Samples
from keras_paligemma.evaluation.truth import COLUMNS
from keras_paligemma.evaluation.truth import truth_columns
from keras_paligemma.metrics.scores import Scores

# What metrics raise for ground truth that they cannot read.
_REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError)


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
    scores = _computed(_metric(benchmark, decode), texts, columns, groups)
    for name in benchmark.judges:
        if judges and name in judges:
            judged = metrics.judged(name, texts, _any(columns), judges[name])
            scores = _joined(scores, judged)
    return scores


def check_truth(
    benchmark: Benchmark,
    samples: Samples,
    decode: Callable[..., Any] | None = None,
) -> None:
    """Score empty answers, so that what cannot be scored is found at once.

    Args:
        benchmark, samples, decode: as `score` takes them.

    Raises:
        ValueError: reference answers are missing, or none that the metric can
            score; the message lists ids. Or no sample has a field without
            which the benchmark's value is not defined.
    """
    columns, groups = truth_columns(benchmark, samples, decode)
    metric = _metric(benchmark, decode)
    try:
        texts = [""] * len(samples)
        values = _computed(metric, texts, columns, groups).values()
    except _REFUSALS as error:
        # A library that is not installed is no fault of the samples.
        if isinstance(error.__cause__, ImportError):
            raise
        ids = _refused(metric, samples, columns)
        raise ValueError(
            f"Samples of {benchmark.name} in {samples.place} cannot be scored "
            f"by {benchmark.metric}. Received: ids {ids}. {error}"
        ) from error
    names = [name.strip("[]") for name in COLUMNS[benchmark.metric]]
    absent = [name for name in names if name not in columns]
    if absent and benchmark.value not in values:
        raise ValueError(
            f"{benchmark.name} reports {benchmark.value!r}, which needs a "
            f"field that no sample has. Expected: {absent} in {samples.place}."
        )


def _metric(benchmark, decode):
    """Return the metric as a function of texts and columns."""
    arguments = dict(benchmark.arguments)
    if benchmark.metric == "refcoco":
        arguments["decode"] = decode
    return functools.partial(getattr(metrics, benchmark.metric), **arguments)


def _computed(metric, texts, columns, groups):
    if groups is None:
        return metric(texts, **columns)
    return _averaged(metric, texts, columns, groups)


def _refused(metric, samples, columns):
    """Return ids, five at most, of samples that alone cannot be scored."""
    ids = []
    for row, id in enumerate(samples.ids):
        try:
            metric([""], **_at(columns, [row]))
        except _REFUSALS:
            ids.append(id)
        if len(ids) == 5:
            break
    return ids


def _at(columns, rows):
    """Return columns at some rows."""
    return {
        name: [values[row] for row in rows] for name, values in columns.items()
    }


def _averaged(metric, texts, columns, groups):
    """Compute a metric for each group, and the mean over groups."""
    rows = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    parts, quality = {}, np.full(len(texts), np.nan)
    for group, here in rows.items():
        part = metric([texts[row] for row in here], **_at(columns, here))
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

    columns = {**scores.columns, **other.columns}
    return Scores(columns, combine, scores.quality)


def _any(columns):
    return next(iter(columns.values()), None)
