"""ChartQA's relaxed accuracy."""

from collections.abc import Sequence

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column

KINDS = {"augmented": "augmented", "human": "human"}


def relaxed_accuracy(
    predictions: Sequence[str],
    answers: Sequence[str],
    kinds: Sequence[str] | None = None,
    lower: bool = True,
) -> Scores:
    """Score answers about charts, numbers with 5 % of tolerance.

    Args:
        predictions: strings.
        answers: strings.
        kinds: of each row "augmented" or "human", or `None`.
        lower: bool, whether upper and lower case are the same.

    Returns:
        `Scores` of "acc" (equal strings) and "relaxed_acc"; with both kinds
        also "relaxed_acc/augmented", "relaxed_acc/human" and their mean,
        "relaxed_acc/mean".

    Example:

    >>> relaxed_accuracy(["10.5"], ["10"]).values()
    {'acc': 0.0, 'relaxed_acc': 1.0}

    Source: big_vision `evaluators/proj/paligemma/transfers/chartqa.py`.
    """
    check_rows(predictions, answers=answers, kinds=kinds)
    if lower:
        predictions = [text.lower() for text in predictions]
        answers = [text.lower() for text in answers]
    pairs = list(zip(predictions, answers, strict=True))
    relaxed = column([relaxed_match(right, text) for text, right in pairs])
    columns = {
        "acc": column([text == right for text, right in pairs]),
        "relaxed_acc": relaxed,
    }
    if kinds is not None:
        columns |= by_kind("relaxed_acc", relaxed, kinds, KINDS)
    return Scores(columns, _with_mean, relaxed)


def _with_mean(means, count):
    parts = [f"relaxed_acc/{name}" for name in KINDS.values()]
    if not means.keys() >= set(parts):
        return means
    mean = sum(means[name] for name in parts) / len(parts)
    return means | {"relaxed_acc/mean": mean}


def relaxed_match(
    target: str, prediction: str, tolerance: float = 0.05
) -> bool:
    """Tell whether two answers are equal, or two numbers nearly so.

    "10%" is 0.1. A target of 0 has no relative error and what has a comma is
    no number, so both must be met as strings; nan is met by nothing.

    Args:
        target: str.
        prediction: str.
        tolerance: float, relative to the target.

    Example:

    >>> relaxed_match("10", "10.5"), relaxed_match("0", "0.0")
    (True, False)

    Source: https://arxiv.org/abs/2203.10244, section 5.1.
    """
    wanted, given = _number(target), _number(prediction)
    if given is None or not wanted:
        return prediction == target
    return abs(given - wanted) / abs(wanted) <= tolerance


def _number(text):
    """Read a number, or a share with its per cent sign; `None` for others."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100.0
        return float(text)
    except ValueError:
        return None
