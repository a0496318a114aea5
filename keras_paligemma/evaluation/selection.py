"""Which records of a source a benchmark scores: split, language, kind."""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_paligemma.evaluation.records import Picked
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.samples import record_id


def check_split(
    benchmark: Benchmark, split: str | None, place: str | Path
) -> None:
    """Raise if a split is wanted of data that does not say which it is.

    Args:
        benchmark: `Benchmark`, of the data's split.
        split: str, the wanted split, or `None` for the data's.
        place: str or path, name of the data in the message.

    Raises:
        ValueError: `split` is not the data's.
    """
    if split not in (None, benchmark.split):
        raise ValueError(
            f"{place} holds one split, and all of its samples are used. "
            f"Expected: `split` {benchmark.split!r} or None, or a source of "
            f"several splits. Received: {split!r}."
        )


def selected(
    benchmark: Benchmark,
    records: Sequence[Mapping[str, Any]],
    place: str | Path,
) -> Sequence[Mapping[str, Any]]:
    """Keep the records that a benchmark scores, where a field says which.

    Args:
        benchmark: `Benchmark`.
        records: sequence of dicts with the benchmark's fields.
        place: str or path, name of the data in messages.

    Returns:
        Sequence of dicts: those of the benchmark's languages and, for
        ChartQA, of its kind; all, if no record says.

    Raises:
        ValueError: only some records say, or a language or kind is missing.
    """
    records = _kept("language", benchmark.languages, benchmark, records, place)
    if benchmark.task == "chartqa" and benchmark.subset is not None:
        kinds = (benchmark.subset,)
        records = _kept("kinds", kinds, benchmark, records, place)
    return records


def _kept(field, wanted, benchmark, records, place):
    """Keep the records with wanted values; raise if one is missing."""
    found = [record.get(field) for record in records] if wanted else []
    if all(value is None for value in found):
        return records
    without = [
        record_id(row, records[row])
        for row, value in enumerate(found)
        if value is None
    ]
    if without:
        raise ValueError(
            f"{len(without)} of {len(found)} samples of {place} lack the "
            f"field {field!r}. Expected: all have it, or none. Received: ids "
            f"{without[:5]} without."
        )
    missing = [value for value in wanted if value not in found]
    if missing:
        raise ValueError(
            f"{place} lacks samples of {benchmark.name}. Expected: the "
            f"{field} {list(wanted)}. Missing: {missing}."
        )
    rows = [row for row, value in enumerate(found) if value in wanted]
    if isinstance(records, list):
        return [records[row] for row in rows]
    return Picked([records], rows)
