"""n-grams of many texts as sorted arrays of integers."""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np


def ngram_counts(
    texts: Sequence[Sequence[int]], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Count the n-grams of each text, for n from 1 to `most`.

    A million captions have some 40 million n-grams: as tuples in dicts they
    would take gigabytes and minutes.

    Args:
        texts: sequences of int, word ids from 0.
        most: int, largest n.

    Yields:
        Three int64 arrays for each n, sorted by text and n-gram: the text's
        index, the n-gram's id, and its count in the text.

    Example:

    >>> for text, gram, count in ngram_counts([[0, 0], [0]], 1):
    ...     print(text, gram, count)
    [0 1] [0 0] [2 1]
    """
    lengths = [len(text) for text in texts]
    words = np.fromiter(
        itertools.chain.from_iterable(texts), "int64", sum(lengths)
    )
    of_text = np.repeat(np.arange(len(texts)), lengths)
    vocabulary = int(words.max()) + 1 if len(words) else 1
    grams = words
    for n in range(1, most + 1):
        if n > 1:
            # An n-gram is an (n - 1)-gram followed by a word.
            last = words[n - 1 :]
            _, grams = np.unique(
                grams[: len(last)] * vocabulary + last, return_inverse=True
            )
        # Skip those that run into the next text.
        start = of_text[: len(grams)]
        inside = start == of_text[n - 1 :]
        size = int(grams.max()) + 1 if len(grams) else 1
        keys, counts = counted(start[inside] * size + grams[inside])
        yield keys // size, keys % size, counts


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct integers and their counts.

    Like `numpy.unique`, but by sorting: NumPy's hash table takes ten times as
    long if most values occur once, as n-grams do.

    Example:

    >>> counted(np.array([3, 1, 3]))
    (array([1, 3]), array([1, 2]))
    """
    values = np.sort(values)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return values[starts], np.diff(starts, append=len(values))
