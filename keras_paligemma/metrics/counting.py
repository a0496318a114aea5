"""Counts: TallyQA and CountBenchQA."""

from collections.abc import Sequence

import numpy as np

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()
NUMERALS = {"none": "0"} | {word: str(n) for n, word in enumerate(_WORDS)}


def tallyqa(
    predictions: Sequence[str],
    answers: Sequence[str],
    simple: Sequence[int] | None = None,
) -> Scores:
    """Score counts, as digits or as words up to twenty.

    Args:
        predictions: list of str.
        answers: list of str.
        simple: list of int, one per row: 1 for a simple question, 0 for a
            complex one, anything else for neither; or `None`.

    Returns:
        `Scores` of "acc"; of "acc/count_N" for each reference count N; and
        with `simple` also of "acc/simple" and "acc/complex".

    Raises:
        ValueError: an answer is no text, or columns are of different lengths.

    Example:

    >>> tallyqa(["Two"], ["2"]).values()
    {'acc': 1.0, 'acc/count_2': 1.0}

    Source: big_vision `evaluators/proj/paligemma/transfers/tallyqa.py`.
    """
    check_rows(predictions, answers=answers, simple=simple)
    check_texts("answers", answers)
    counts = [numeral(answer) for answer in answers]
    pairs = zip(predictions, counts, strict=True)
    right = column([numeral(text) == count for text, count in pairs])
    columns = {"acc": right}
    if simple is not None:
        columns |= by_kind("acc", right, simple, {1: "simple", 0: "complex"})
    there = sorted(set(counts), key=lambda count: (len(count), count))
    names = {count: f"count_{count}" for count in there}
    return Scores(columns | by_kind("acc", right, np.array(counts), names))


def numeral(text: str) -> str:
    """Convert a number word, "none" to "twenty", to digits.

    Args:
        text: str; case is ignored.

    Returns:
        str, digits; other text is returned unchanged.

    Example:

    >>> numeral("Seven"), numeral("7."), numeral("many")
    ('7', '7.', 'many')
    """
    return NUMERALS.get(text.lower(), text)
