"""ChartQA's relaxed accuracy."""

from collections.abc import Sequence

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_kinds
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

KINDS = {"augmented": "augmented", "human": "human"}


def relaxed_accuracy(
    predictions: Sequence[str],
    answers: Sequence[str],
    kinds: Sequence[str] | None = None,
    lower: bool = True,
) -> Scores:
    """Score answers about charts, with a tolerance of 5 % for numbers.

    Args:
        predictions: list of str.
        answers: list of str.
        kinds: list of "augmented" or "human", one per row, or `None`, which
            a row may be too.
        lower: bool, whether to ignore case.

    Returns:
        `Scores` of "acc" (equal strings) and "relaxed_acc"; with both kinds
        also "relaxed_acc/augmented", "relaxed_acc/human" and their mean,
        "relaxed_acc/mean".

    Raises:
        ValueError: an answer is no text, a kind is unknown, or columns are of
            different lengths.

    Example:

    >>> relaxed_accuracy(["10.5"], ["10"]).values()
    {'acc': 0.0, 'relaxed_acc': 1.0}

    Source: big_vision `evaluators/proj/paligemma/transfers/chartqa.py`.
    """
    check_rows(predictions, answers=answers, kinds=kinds)
    check_texts("answers", answers)
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
        check_kinds("kinds of charts", kinds, [*KINDS, None])
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
    """Return whether two strings are equal, or two numbers nearly equal.

    "10%" is 0.1. A target of 0, which has no relative error, and numbers with
    a comma are compared as strings; nan matches nothing.

    Args:
        target: str, the reference answer.
        prediction: str.
        tolerance: float, relative to the target.

    Returns:
        bool.

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
    """Parse a number or a percentage; return `None` for other text."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100.0
        return float(text)
    except ValueError:
        return None
