"""Short answers: exact match, VQA's min(1, n/3), ANLS."""

from collections.abc import Sequence

from keras_paligemma.metrics.edits import edit_distance
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column

# Answers that agree with one of several people as much as is asked for.
_ENOUGH = 3.0


def vqa(
    predictions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    lower: bool = False,
) -> Scores:
    """Score short answers, each against one right answer or several.

    Args:
        predictions: strings.
        answers: of each row one string, which must be met exactly; or several,
            of which n are equal to the prediction.
        lower: bool, whether upper and lower case are the same.

    Returns:
        `Scores` of "acc", 1 for equality with a single answer and min(1, n/3)
        of several; "acc_any", 1 where any is met; and "anls".

    Raises:
        ValueError: columns of different lengths, or a row without answers.

    Example:

    >>> vqa(["cat"], [["cat", "cat", "dog"]]).values()["acc"]
    0.6666666666666666

    Source: big_vision `evaluators/proj/paligemma/transfers/vqa.py`; the
    threshold is https://visualqa.org/evaluation.html without its ten subsets.
    """
    check_rows(predictions, answers=answers)
    rows = {"acc": [], "acc_any": [], "anls": []}
    for row, (text, right) in enumerate(zip(predictions, answers, strict=True)):
        enough = 1.0 if isinstance(right, str) else _ENOUGH
        several = [right] if isinstance(right, str) else list(right)
        if not several:
            raise ValueError(
                f"Row {row} has no right answer. Expected: one or more."
            )
        if lower:
            text, several = text.lower(), [answer.lower() for answer in several]
        met = several.count(text)
        rows["acc"].append(min(1.0, met / enough))
        rows["acc_any"].append(min(1.0, float(met)))
        rows["anls"].append(max(anls(answer, text) for answer in several))
    return Scores({name: column(values) for name, values in rows.items()})


def anls(target: str, prediction: str, threshold: float = 0.5) -> float:
    """Compare two strings by what of the longer one need not be edited.

    Args:
        target: str.
        prediction: str.
        threshold: float; where at least this share differs, nothing counts.

    Returns:
        float, 1 for equal strings; 0 from the threshold on. An empty target
        is met by an empty prediction alone.

    Example:

    >>> anls("hello", "hallo")
    0.8

    Source: https://arxiv.org/abs/1907.00490, equation 1.
    """
    if not target:
        return float(prediction == "")
    longer = max(len(target), len(prediction))
    differing = edit_distance(target, prediction) / longer
    return 1 - differing if differing < threshold else 0.0


def yes_or_no(predictions: Sequence[str], answers: Sequence[str]) -> Scores:
    """Score answers of yes or no, such as POPE's.

    Args:
        predictions: strings; their case does not matter.
        answers: strings in lower case.

    Returns:
        `Scores` of "acc", and "valid_percent", the share of predictions that
        are one of the two words (a share in spite of the original's name).

    Source: big_vision `evaluators/proj/paligemma/transfers/pope.py`.
    """
    check_rows(predictions, answers=answers)
    lowered = [text.lower() for text in predictions]
    pairs = zip(lowered, answers, strict=True)
    return Scores(
        {
            "acc": column([text == right for text, right in pairs]),
            "valid_percent": column([t in ("yes", "no") for t in lowered]),
        }
    )
