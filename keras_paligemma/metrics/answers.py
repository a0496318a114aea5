"""Short answers: exact match, VQA's min(1, n/3), ANLS."""

from collections.abc import Sequence

from keras_paligemma.metrics.edits import edit_distance
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

# Number of equal reference answers from which a prediction counts in full.
_ENOUGH = 3.0


def vqa(
    predictions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    lower: bool = False,
) -> Scores:
    """Score short answers against one or more reference answers.

    Args:
        predictions: list of str.
        answers: list of one str per row, which must match exactly; or of a
            list of str per row.
        lower: bool, whether to ignore case.

    Returns:
        `Scores` of "acc", which is 1 for a match with an answer that is a
        string, and min(1, n/3) for matches with n answers of a list, even of
        a list of one; "acc_any", 1 for a match with any; and "anls".

    Raises:
        ValueError: columns of different lengths, or a row without answers or
            with one that is no text.

    Example:

    >>> vqa(["cat"], [["cat", "cat", "dog"]]).values()["acc"]
    0.6666666666666666

    Source: big_vision `evaluators/proj/paligemma/transfers/vqa.py`; the
    threshold is https://visualqa.org/evaluation.html without its ten subsets.
    """
    check_rows(predictions, answers=answers)
    check_texts("answers", answers, several=True)
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
    """Return the normalised Levenshtein similarity of two strings (ANLS).

    Args:
        target: str, the reference answer.
        prediction: str.
        threshold: float, normalised edit distance from which the score is 0.

    Returns:
        float, 1 for equal strings. An empty target matches only an empty
        prediction.

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
        predictions: list of str; case is ignored.
        answers: list of str in lower case.

    Returns:
        `Scores` of "acc" and "valid_percent", the fraction of predictions that
        are "yes" or "no" (0 to 1, despite the original's name).

    Raises:
        ValueError: an answer is no text, or columns are of different lengths.

    Example:

    >>> yes_or_no(["Yes", "maybe"], ["yes", "no"]).values()
    {'acc': 0.5, 'valid_percent': 0.5}

    Source: big_vision `evaluators/proj/paligemma/transfers/pope.py`.
    """
    check_rows(predictions, answers=answers)
    check_texts("answers", answers)
    lowered = [text.lower() for text in predictions]
    pairs = zip(lowered, answers, strict=True)
    return Scores(
        {
            "acc": column([text == right for text, right in pairs]),
            "valid_percent": column([t in ("yes", "no") for t in lowered]),
        }
    )
