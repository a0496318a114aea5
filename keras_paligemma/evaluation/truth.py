"""The ground truth of samples, as the columns that metrics compare with."""

from collections.abc import Callable
from typing import Any

from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.samples import Samples

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
        if not needed:
            # A row may lack it: the row is then of no kind.
            if any(value is not None for value in values):
                columns[name] = values
            continue
        # A picture may be without words.
        may_be_empty = name in ("polygons", "texts")
        missing = [
            id
            for id, value in zip(samples.ids, values, strict=True)
            if _lacks(value, may_be_empty)
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


def _lacks(value, may_be_empty):
    """Return whether ground truth, or a part of it, is missing."""
    if not isinstance(value, list):
        return value is None
    empty = not value and not may_be_empty
    return empty or any(part is None for part in value)


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
