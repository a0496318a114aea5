"""The length of long descriptions."""

import re
from collections.abc import Sequence

from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column

# The end of a sentence: mark, closing quotes or brackets, then a space or end.
_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def description_lengths(predictions: Sequence[str]) -> Scores:
    """Measure descriptions, as the model card does for DOCCI.

    Args:
        predictions: list of str.

    Returns:
        `Scores` of "avg_char" and "avg_sent", the mean numbers of characters
        and of sentences (which the card's footnote calls characters too).

    Raises:
        ValueError: there are no predictions.

    Example:

    >>> description_lengths(["A cat. It sleeps!"]).values()
    {'avg_char': 17.0, 'avg_sent': 2.0}

    Source: https://arxiv.org/abs/2404.19753.
    """
    check_rows(predictions)
    return Scores(
        {
            "avg_char": column([len(text) for text in predictions]),
            "avg_sent": column([sentences(text) for text in predictions]),
        }
    )


def sentences(text: str) -> int:
    """Count the sentences of a text, an unfinished last one included.

    Args:
        text: str.

    Returns:
        int.

    Example:

    >>> sentences("A 3.5 m wall. No end"), sentences("")
    (2, 0)
    """
    ends = [found.end() for found in _END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(rest.strip())
