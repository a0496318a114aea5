"""RSVQA: accuracy by the type of a question, then averaged."""

from collections.abc import Sequence

from keras_paligemma.metrics.answers import vqa
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_rows

TYPES = ("comp", "count", "presence", "rural_urban", "area")
# The original reports its average without numbers for both data sets under one
# name; where a data set has all of these types, the second replaces the first.
_NO_NUMBERS = (("comp", "presence", "rural_urban"), ("comp", "presence"))


def rsvqa(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    question_types: Sequence[str],
    lower: bool = True,
) -> Scores:
    """Score answers about satellite pictures.

    Args:
        predictions: strings.
        answers: of each row one or more strings in a list.
        question_types: of each row one of `TYPES`.
        lower: bool, whether upper and lower case are the same.

    Returns:
        `Scores` of what `vqa` gives; "acc_TYPE", where any answer is met;
        "acc_avg", the mean over the types that there are; "acc_avg_nonum",
        that of comparison and presence, which the card reports.

    Raises:
        ValueError: an unknown type.

    Example:

    >>> rsvqa(["yes"], [["yes"]], ["comp"]).values()["acc_avg"]
    1.0

    Source: big_vision `evaluators/proj/paligemma/transfers/rsvqa.py`.
    """
    check_rows(predictions, answers=answers, question_types=question_types)
    unknown = sorted(set(question_types) - set(TYPES))
    if unknown:
        raise ValueError(
            f"Unknown types of questions. Expected: {list(TYPES)}. Received: "
            f"{unknown[:5]}."
        )
    columns = dict(vqa(predictions, answers, lower).columns)
    any_met = columns["acc_any"]
    split = by_kind("acc", any_met, question_types, {t: t for t in TYPES})
    parts = {name.replace("/", "_"): one for name, one in split.items()}

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
