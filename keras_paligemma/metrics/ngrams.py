"""n-grams of many texts as sorted arrays of integers."""

import itertools
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np


class Ngrams:
    """Words of many texts, whose n-grams are counted order by order.

    A million captions have some 40 million n-grams: as tuples in dictionaries
    they would take gigabytes and minutes.

    Args:
        texts: lists of words.

    Example:

    >>> for texts, grams, counts in Ngrams([["a", "a"], ["a"]]).orders(1):
    ...     print(texts, grams, counts)
    [0 1] [0 0] [2 1]
    """

    def __init__(self, texts: Sequence[Sequence[str]]):
        numbers = {}
        for word in itertools.chain.from_iterable(texts):
            numbers.setdefault(word, len(numbers))
        lengths = [len(words) for words in texts]
        self._words = np.fromiter(
            (numbers[w] for w in itertools.chain.from_iterable(texts)),
            "int64",
            sum(lengths),
        )
        self._texts = np.repeat(np.arange(len(texts)), lengths)
        self._size = len(numbers)

    def orders(
        self, most: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Count the n-grams of each text, for n of 1 to `most`.

        Yields:
            Three int64 arrays, sorted by text and n-gram: the text's number,
            the n-gram's, and how often the text has it.
        """
        grams = self._words
        for n in range(1, most + 1):
            texts = self._texts[: len(grams)]
            if n > 1:
                # An n-gram is one of n - 1 words and the word behind it.
                last = self._words[n - 1 :]
                grams = grams[: len(last)] * self._size + last
                texts = texts[: len(last)]
                _, grams = np.unique(grams, return_inverse=True)
            # Those that run into the next text are none.
            inside = texts == self._texts[n - 1 :]
            size = int(grams.max()) + 1 if len(grams) else 1
            keys, counts = counted(texts[inside] * size + grams[inside])
            yield keys // size, keys % size, counts


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort integers and count each, as `numpy.unique` does.

    By one sort: NumPy's hash table takes ten times as long where most values
    occur once, as n-grams do.

    Example:

    >>> counted(np.array([3, 1, 3]))
    (array([1, 3]), array([1, 2]))
    """
    values = np.sort(values)
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return values[starts], np.diff(starts, append=len(values))
