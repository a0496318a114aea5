"""ScienceQA: the letter of the choice that a sentence names."""

import re
from collections.abc import Sequence

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

_ANSWER = re.compile(r"the answer is ([a-z])\.")
FAILED = "failed"


def science_qa(predictions: Sequence[str], answers: Sequence[str]) -> Scores:
    """Score sentences that begin with "The answer is B."

    Args:
        predictions: list of str.
        answers: list of str of the same form.

    Returns:
        `Scores` of "acc" and "parsefail", the fraction of predictions without
        a letter. (If the answer has none either, they match, as in the
        original.)

    Raises:
        ValueError: an answer is no text, or columns are of different lengths.

    Example:

    >>> science_qa(["The answer is B. Since…"], ["The answer is B."]).values()
    {'acc': 1.0, 'parsefail': 0.0}

    Source: big_vision `evaluators/proj/paligemma/transfers/science_qa.py`.
    """
    check_rows(predictions, answers=answers)
    check_texts("answers", answers)
    letters = [choice(text) for text in predictions]
    right = [choice(text) for text in answers]
    pairs = zip(letters, right, strict=True)
    return Scores(
        {
            "acc": column([first == second for first, second in pairs]),
            "parsefail": column([letter == FAILED for letter in letters]),
        }
    )


def choice(text: str) -> str:
    """Return the letter in "The answer is B.", in lower case.

    Args:
        text: str that begins with that sentence.

    Returns:
        str, a letter, or `FAILED`.

    Example:

    >>> choice("The answer is C."), choice("C")
    ('c', 'failed')
    """
    found = _ANSWER.match(text.lower())
    return found[1] if found else FAILED
