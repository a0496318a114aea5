"""Error rates of transcribed music: characters, symbols and lines."""

from collections.abc import Sequence

import numpy as np

from keras_paligemma.metrics.edits import edit_distance
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

_MARKS = {"\n": " <b> ", "\t": " <t> "}


def music(predictions: Sequence[str], scores: Sequence[str]) -> Scores:
    """Score transcriptions in Humdrum's kern notation, as GrandStaff does.

    Args:
        predictions: list of str, lines of symbols with tabs between staves.
        scores: list of str, the reference transcriptions.

    Returns:
        `Scores` of "cer", "ser" and "ler": the edit distance divided by the
        length of the reference, in characters, symbols and lines, over all
        rows; lower is better. "cer" follows the published evaluator, which
        splits the marks of tabs and line ends into characters but not the
        symbols; "cer_characters" is the usual character error rate.

    Raises:
        ValueError: columns of different lengths, or a reference that is empty
            or no text.

    Example:

    >>> music(["4c\\t4e"], ["4c\\t4d"]).values()["ser"]
    0.3333333333333333

    Source: https://github.com/multiscore/e2e-pianoform.
    """
    check_rows(predictions, scores=scores)
    check_texts("scores", scores)
    empty = [row for row, text in enumerate(scores) if not text]
    if empty:
        raise ValueError(
            "An error rate divides by the length of the right text. Expected: "
            f"text. Received: none in the rows {empty[:5]}."
        )
    columns = {}
    for name, cut in _CUTS.items():
        edits, lengths = [], []
        for text, right in zip(predictions, scores, strict=True):
            wanted = cut(right)
            edits.append(edit_distance(cut(text), wanted))
            lengths.append(len(wanted))
        columns[f"{name}-edits"] = column(edits)
        columns[f"{name}-length"] = column(lengths)

    quality = -columns["ser-edits"] / columns["ser-length"]
    return Scores(columns, _rates, quality)


def _rates(means, count):
    return {
        name: np.divide(means[f"{name}-edits"], means[f"{name}-length"])
        for name in _CUTS
    }


def symbols(text: str) -> list[str]:
    """Split a text into symbols; a tab or a newline is one symbol.

    Args:
        text: str.

    Returns:
        list of str.

    Example:

    >>> symbols("4c\\t4e")
    ['4c', '<t>', '4e']
    """
    for sign, mark in _MARKS.items():
        text = text.replace(sign, mark)
    return text.split(" ")


def _published_characters(text):
    marks = {mark.strip() for mark in _MARKS.values()}
    return [
        part
        for symbol in symbols(text)
        for part in (symbol if symbol in marks else [symbol])
    ]


_CUTS = {
    "cer": _published_characters,
    "ser": symbols,
    "ler": lambda text: text.split("\n"),
    "cer_characters": list,
}
