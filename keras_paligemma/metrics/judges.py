"""Metrics that need another model or human judges: the interface only."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column

# What each measures, and what the user has to provide for it.
JUDGES = {
    "radgraph_f1": (
        "the F1 of clinical entities and relations that RadGraph finds in both "
        "reports: pip install radgraph, whose model needs a PhysioNet licence, "
        "then judge=lambda predictions, references: F1RadGraph("
        "reward_level='partial')(hyps=predictions, refs=references)[1]"
    ),
    "nes": (
        "the share of sentences that the picture does not entail, as people "
        "judge them (non-entailment sentences, in per cent)"
    ),
    "toxicity": (
        "the score of the Perspective API for each text, with a key of yours"
    ),
}


def judged(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Any] | None = None,
    judge: Callable[..., Any] | None = None,
) -> Scores:
    """Score texts by a judge that the caller provides.

    Args:
        name: str, one of `JUDGES`.
        predictions: list of str.
        references: list, what the judge compares with, or `None`.
        judge: function of predictions and references that returns one float
            per row.

    Returns:
        `Scores` with one value, `name`.

    Raises:
        ValueError: the name is unknown, there is no judge, or it returned a
            wrong number of values.

    Example:

    >>> judged("nes", ["A cat."], judge=lambda texts, _: [0.0]).values()
    {'nes': 0.0}
    """
    if name not in JUDGES:
        raise ValueError(
            f"Unknown judge. Expected: one of {list(JUDGES)}. Received: "
            f"{name!r}."
        )
    if judge is None:
        raise ValueError(
            f"{name} is decided by a model or by people outside of this "
            "package. Expected: `judge`, a function of predictions and "
            f"references that gives one number a row: {JUDGES[name]}. "
            "Received: None."
        )
    check_rows(predictions, references=references)
    found = [float(value) for value in judge(predictions, references)]
    if len(found) != len(predictions):
        raise ValueError(
            f"The judge of {name} returned {len(found)} numbers. Expected: "
            f"{len(predictions)}, one a row."
        )
    return Scores({name: column(found)})
