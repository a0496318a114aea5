"""VQAv2's accuracy, with the normalisation of its official evaluator."""

import re
from collections.abc import Sequence

import numpy as np

from keras_paligemma.metrics.counting import NUMERALS
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import by_kind
from keras_paligemma.metrics.scores import check_kinds
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

TYPES = {"yes/no": "yesno", "number": "number", "other": "other"}

_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# The official evaluator's lookbehind is misspelt and never matches, so a full
# stop stays only before a digit.
_FULL_STOP = re.compile(r"\.(?!\d)")

# Contractions whose apostrophe is restored: the only one, or one of two.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't "
    "haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't "
    "might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's "
    "something'd something'll that's there'd there're there's they'd they'll "
    "they're they've 'twas wasn't we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'll who's who've why'll why're "
    "why's won't would've wouldn't y'all you'd you'll you're you've"
).split()
_DOUBLE_CONTRACTIONS = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've "
    "somebody'd've someone'd've something'd've there'd've they'd've we'd've "
    "who'd've wouldn't've you'd've"
).split()


def _replacements():
    """Return the words that the official evaluator replaces, as a dict.

    Its list has keys with capitals, which never match lower-case words, and one
    reversed entry, which has an effect and is kept.
    """
    table = {word: text for word, text in NUMERALS.items() if int(text) <= 10}
    table |= {word.replace("'", ""): word for word in _CONTRACTIONS}
    for word in _DOUBLE_CONTRACTIONS:
        base, first, second = word.split("'")
        table[f"{base}{first}'{second}"] = word
        table[f"{base}'{first}{second}"] = word
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll"}
    for key in ("yall'd've", "y'alld've", "y'all'dve"):
        table[key] = "y'all'd've"
    for key in ("ow's'at", "'ows'at", "'ow'sat"):
        table[key] = "'ow's'at"
    return table | {"somebody'd": "somebodyd"}


_REPLACEMENTS = _replacements()


def vqav2(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    answer_types: Sequence[str] | None = None,
) -> Scores:
    """Score answers against those of ten annotators, for VQAv2 and TextVQA.

    The accuracy is min(1, n/3), where n of nine annotators gave this answer,
    averaged over the ten ways to leave one annotator out. Answers are
    normalised only if the ten differ, as in the official evaluator.

    Args:
        predictions: list of str.
        answers: list of ten str per row.
        answer_types: list of one of `TYPES` per row, or `None`, which a row
            may be too.

    Returns:
        `Scores` of "acc" and, with types, "acc/yesno", "acc/number" and
        "acc/other".

    Raises:
        ValueError: a row does not have ten answers, an answer type is unknown,
            or columns are of different lengths.

    Example:

    >>> vqav2(["two"], [["2"] * 3 + ["3"] * 7]).values()
    {'acc': 0.9}

    Source: big_vision `evaluators/proj/paligemma/transfers/vqav2.py`;
    https://visualqa.org/evaluation.html.
    """
    check_rows(predictions, answers=answers, answer_types=answer_types)
    check_texts("answers", answers, several=True)
    rows = []
    for row, (text, ten) in enumerate(zip(predictions, answers, strict=True)):
        if len(ten) != 10 or isinstance(ten, str):
            raise ValueError(
                "VQAv2's accuracy is defined for ten answers. Received: "
                f"{ten!r:.120} of row {row}. For another number use `vqa`."
            )
        rows.append(_accuracy(text, ten))
    columns = {"acc": column(rows)}
    if answer_types is not None:
        check_kinds("types of answers", answer_types, [*TYPES, None])
        columns |= by_kind("acc", columns["acc"], answer_types, TYPES)
    return Scores(columns)


def _accuracy(text, ten):
    text, ten = strip_space(text), [strip_space(answer) for answer in ten]
    if len(set(ten)) > 1:
        text = normalise(text)
        known = {answer: normalise(answer) for answer in set(ten)}
        ten = [known[answer] for answer in ten]
    return _LEAVING_ONE_OUT[ten.count(text)]


def _leaving_one_out(met):
    """Return the accuracy if `met` of ten answers match."""
    agrees = np.arange(10) < met
    return float(np.mean([min((met - same) / 3, 1.0) for same in agrees]))


_LEAVING_ONE_OUT = [_leaving_one_out(met) for met in range(11)]


def strip_space(text: str) -> str:
    """Convert line breaks and tabs to spaces, and strip the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """Normalise an answer as VQA's official evaluator does, faults included.

    A punctuation mark is removed if it is next to a space anywhere in the
    text, and replaced by a space otherwise; a comma between digits removes all
    marks. Then full stops and articles are removed and letters lowered, number
    words to ten become digits, and contractions get their apostrophe.

    Args:
        text: str, stripped by `strip_space`.

    Returns:
        str.

    Example:

    >>> normalise("The red/blue one, 1,000.")
    'redblue 1 1000'
    """
    out = text
    digit_comma = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        if mark not in text:
            continue
        goes = digit_comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if goes else " ")
    out = _FULL_STOP.sub("", out)
    words = [word for word in out.lower().split() if word not in _ARTICLES]
    return " ".join(_REPLACEMENTS.get(word, word) for word in words)
