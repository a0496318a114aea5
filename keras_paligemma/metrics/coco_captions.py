"""CIDEr, BLEU and ROUGE-L of captions, as COCO's evaluator computes them."""

import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from keras_paligemma.metrics.caption_tokens import caption_tokens
from keras_paligemma.metrics.ngrams import counted
from keras_paligemma.metrics.ngrams import ngram_counts
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column

_ORDERS = 4
# Standard deviation of CIDEr-D's Gaussian length penalty, in words.
_SIGMA = 6.0
# ROUGE-L weighs recall more than precision.
_BETA = 1.2
# COCO's BLEU adds these to denominators and numerators, against 0 / 0.
_SMALL, _TINY = 1e-9, 1e-15
# n-grams compared at a time, which bounds the memory.
_PART = 2**20


def captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: bool = True,
) -> Scores:
    """Compute CIDEr, BLEU and ROUGE-L of captions.

    Args:
        predictions: list of str.
        references: list of one or more reference captions per row.
        tokenize: bool; `False` if the strings are tokenised already and
            separated by spaces, such as by Java's PTB tokenizer.

    Returns:
        `Scores` of "cider", "bleu-1" to "bleu-4" and "rouge"; rows are sorted
        by CIDEr.

    Raises:
        ValueError: columns of different lengths, or a row without references or
            with one that is no text.

    Example:

    >>> scores = captions(["a cat sits"] * 2, [["a cat sits"], ["a dog"]])
    >>> round(scores.values()["rouge"], 3)
    0.707

    Source: https://github.com/salaniz/pycocoevalcap.
    """
    rows, right = _tokens(predictions, references, tokenize)
    bleu_scores = _bleu(rows, right)
    columns = {"cider": _cider(rows, right), "rouge": _rouge(rows, right)}

    def combine(means, count):
        own = {name: means[name] for name in columns}
        return own | dict(_bleu_of(means, count))

    return Scores(columns | dict(bleu_scores.columns), combine)


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: bool = True,
) -> Scores:
    """Compute CIDEr-D: matching n-grams, weighted by tf-idf.

    Document frequencies come from the references of all rows, so the value of
    a subset of rows is not comparable.

    Args:
        predictions, references, tokenize: as `captions` takes them.

    Returns:
        `Scores` of "cider", 0 to 10; reports multiply it by 100.

    Raises:
        ValueError: columns of different lengths, or a row without references or
            with one that is no text.

    Source: https://arxiv.org/abs/1411.5726, in the form of its section 6.
    """
    rows, right = _tokens(predictions, references, tokenize)
    return Scores({"cider": _cider(rows, right)})


def bleu(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: bool = True,
) -> Scores:
    """Compute corpus BLEU: n-gram precision over all rows.

    Args:
        predictions, references, tokenize: as `captions` takes them.

    Returns:
        `Scores` of "bleu-1" to "bleu-4"; rows are sorted by 4-gram precision.

    Raises:
        ValueError: columns of different lengths, or a row without references or
            with one that is no text.

    Source: https://aclanthology.org/P02-1040, with the closest reference
    length.
    """
    return _bleu(*_tokens(predictions, references, tokenize))


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: bool = True,
) -> Scores:
    """Compute ROUGE-L: the longest common subsequence of words.

    The best recall and the best precision may come from two references.

    Args:
        predictions, references, tokenize: as `captions` takes them.

    Returns:
        `Scores` of "rouge".

    Raises:
        ValueError: columns of different lengths, or a row without references or
            with one that is no text.

    Source: https://aclanthology.org/W04-1013.
    """
    rows, right = _tokens(predictions, references, tokenize)
    return Scores({"rouge": _rouge(rows, right)})


def _tokens(predictions, references, tokenize):
    """Convert captions to integer arrays of word ids.

    A million lists of strings would take a gigabyte. A caption that many rows
    share is tokenised once.
    """
    check_rows(predictions, references=references)
    check_texts("references", references, several=True)
    known, numbers = {}, {}

    def cut(text):
        if text not in known:
            words = caption_tokens(text) if tokenize else text.split()
            known[text] = array.array(
                "i", [numbers.setdefault(word, len(numbers)) for word in words]
            )
        return known[text]

    right = []
    for row, several in enumerate(references):
        if isinstance(several, str) or not len(several):
            raise ValueError(
                f"Row {row} has no list of references. Expected: one or more "
                f"captions. Received: {several!r:.80}."
            )
        right.append([cut(reference) for reference in several])
    return [cut(text) for text in predictions], right


def _cider(rows, right):
    flat = [words for several in right for words in several]
    owner = np.repeat(
        np.arange(len(rows)), [len(references) for references in right]
    )
    found = np.zeros(len(flat))
    lengths = np.array([max(len(words) - 1, 0) for words in [*rows, *flat]])
    delta = lengths[owner] - lengths[len(rows) :]
    penalty = np.e ** (-(delta.astype("float64") ** 2) / (2 * _SIGMA**2))
    for texts, grams, counts in ngram_counts([*rows, *flat], _ORDERS):
        # Entries are sorted by text, those of the predictions first.
        split = np.searchsorted(texts, len(rows))
        size = int(grams.max()) + 1 if len(grams) else 1
        keys = owner[texts[split:] - len(rows)] * size + grams[split:]
        frequency = np.bincount(counted(keys)[0] % size, minlength=size)
        rarity = np.log(float(len(rows))) - np.log(np.maximum(frequency, 1.0))
        weights = counts * rarity[grams]
        norms = np.sqrt(
            np.bincount(texts, weights**2, minlength=len(rows) + len(flat))
        )
        total = _agreement(
            texts[:split] * size + grams[:split],
            weights[:split],
            keys,
            weights[split:],
            texts[split:] - len(rows),
            len(flat),
        )
        scale = norms[owner] * norms[len(rows) :]
        found += np.divide(total, scale, out=total, where=scale != 0) * penalty
    by_row = np.bincount(owner, found / _ORDERS, minlength=len(rows))
    return 10.0 * by_row / np.array([len(references) for references in right])


def _agreement(keys, weights, wanted, other_weights, texts, count):
    """Return the clipped tf-idf product of each reference and its prediction.

    Args:
        keys: sorted int64 array, row and n-gram of the predictions.
        weights: float64 array, the weights of `keys`.
        wanted: int64 array, row and n-gram of the references.
        other_weights: float64 array, the weights of `wanted`.
        texts: int64 array, index of the reference of each of `wanted`.
        count: int, number of references.

    Returns:
        float64 array (count,).
    """
    total = np.zeros(count)
    if not len(keys):
        return total
    for first in range(0, len(wanted), _PART):
        part = slice(first, first + _PART)
        place = np.minimum(np.searchsorted(keys, wanted[part]), len(keys) - 1)
        there = keys[place] == wanted[part]
        mine = other_weights[part]
        agreeing = np.where(there, np.minimum(weights[place], mine) * mine, 0.0)
        total += np.bincount(texts[part], agreeing, minlength=count)
    return total


def _bleu(rows, right):
    names = ["length", "nearest"]
    names += [f"{kind}-{n + 1}" for kind in ("met", "all") for n in range(4)]
    table = np.zeros((len(rows), len(names)))
    for row, (words, several) in enumerate(zip(rows, right, strict=True)):
        length = len(words)
        nearest = min(
            (abs(len(reference) - length), len(reference))
            for reference in several
        )[1]
        met = []
        for n in range(1, _ORDERS + 1):
            most = Counter()
            for reference in several:
                most |= _counted(reference, n)
            mine = _counted(words, n)
            met.append(sum(min(mine[g], most[g]) for g in mine if g in most))
        possible = [max(length - n, 0) for n in range(_ORDERS)]
        table[row] = [length, nearest, *met, *possible]
    columns = dict(zip(names, table.T, strict=True))

    quality = columns["met-4"] / np.maximum(columns["all-4"], 1)
    return Scores(columns, _bleu_of, quality)


def _bleu_of(means, count):
    values, product = {}, 1.0
    ratio = (count * means["length"] + _TINY) / (
        count * means["nearest"] + _SMALL
    )
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    for n in range(1, _ORDERS + 1):
        product = product * (
            (count * means[f"met-{n}"] + _TINY)
            / (count * means[f"all-{n}"] + _SMALL)
        )
        values[f"bleu-{n}"] = product ** (1 / n) * brevity
    return values


def _counted(words, n):
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _rouge(rows, right):
    found = []
    for words, several in zip(rows, right, strict=True):
        common = [_longest_common(words, reference) for reference in several]
        # An empty caption counts as one word, as Python splits "" at spaces.
        precision = max(common) / max(len(words), 1)
        recall = max(
            length / max(len(other), 1)
            for length, other in zip(common, several, strict=True)
        )
        if not precision:
            found.append(float(not words and not all(several)))
            continue
        weight = _BETA**2
        found.append(
            (1 + weight) * precision * recall / (recall + weight * precision)
        )
    return column(found)


def _longest_common(first, second):
    """Return the length of the longest common subsequence, bit-parallel.

    Source: https://doi.org/10.1007/978-3-540-27836-8_103, Hyyrö's form.
    """
    places = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & ones
    return len(first) - row.bit_count()
