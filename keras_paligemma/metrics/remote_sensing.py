"""RSVQA: accuracy by question type, and averages over types."""

from collections.abc import Sequence

from keras_paligemma.metrics.answers import vqa
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_kinds
from keras_paligemma.metrics.scores import check_rows

TYPES = ("comp", "count", "presence", "rural_urban", "area")
# Types in the average without numbers, of either data set. The original reports
# both under one name; if all types occur, the second replaces the first.
_NO_NUMBERS = (("comp", "presence", "rural_urban"), ("comp", "presence"))


def rsvqa(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    question_types: Sequence[str],
    lower: bool = True,
) -> Scores:
    """Score answers about satellite pictures.

    Args:
        predictions: list of str.
        answers: list of one or more str per row.
        question_types: list of one of `TYPES` per row.
        lower: bool, whether to ignore case.

    Returns:
        `Scores` of the values of `vqa`; "acc_TYPE", whether any answer
        matches; "acc_avg", the mean over the types that occur; and
        "acc_avg_nonum", the mean without counts and areas, which the card
        reports.

    Raises:
        ValueError: an unknown type, or columns of different lengths.

    Example:

    >>> rsvqa(["yes"], [["yes"]], ["comp"]).values()["acc_avg"]
    1.0

    Source: big_vision `evaluators/proj/paligemma/transfers/rsvqa.py`.
    """
    check_rows(predictions, question_types=question_types)
    check_kinds("types of questions", question_types, TYPES)
    columns = dict(vqa(predictions, answers, lower).columns)
    any_met = columns["acc_any"]
    split = by_kind("acc", any_met, question_types, {t: t for t in TYPES})
    parts = {name.replace("/", "_"): values for name, values in split.items()}

    return Scores(columns | parts, _with_averages, any_met)


def _with_averages(means, count):
    parts = [f"acc_{kind}" for kind in TYPES if f"acc_{kind}" in means]
    values = means | {
        "acc_avg": sum(means[name] for name in parts) / len(parts)
    }
    for types in _NO_NUMBERS:
        names = [f"acc_{kind}" for kind in types]
        if means.keys() >= set(names):
            mean = sum(means[name] for name in names) / len(names)
            values["acc_avg_nonum"] = mean
    return values
