"""Texts that are still being generated; texts of single tokens."""

from collections.abc import Sequence
from typing import Any


def cut(text, stop_strings):
    """Return a text up to the first of its stop strings.

    That is the one that ends first, so that later text changes nothing; of
    those that end together, the longest.

    Example:
        >>> cut("a cat. A dog", (". ", "dog"))
        'a cat'
    """
    places = [
        (text.index(string) + len(string), text.index(string))
        for string in stop_strings
        if string in text
    ]
    _, start = min(places, default=(None, None))
    return text[:start]


def settled(text, stop_strings):
    """Return the part of a text that later tokens cannot change.

    A multi-byte character may be incomplete, and a stop string may have
    begun.

    Example:
        >>> settled("a cat.", (". ",))
        'a cat'
    """
    text = cut(text, stop_strings).rstrip("\ufffd")
    begun = [
        length
        for stop in stop_strings
        for length in range(1, len(stop))
        if text.endswith(stop[:length])
    ]
    return text[: len(text) - max(begun, default=0)]


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; joined, they are the whole text.

    Args:
        tokenizer: `PaliGemmaTokenizer`.
        ids: ints.

    Returns:
        list of str. The first byte token of a multi-byte character holds the
        character, the others are empty.
    """
    until = tokenizer.detokenize([list(ids[: i + 1]) for i in range(len(ids))])
    pieces, said, waiting = [""] * len(ids), 0, None
    for i, text in enumerate(until):
        waiting = i if waiting is None else waiting
        # An incomplete character decodes to U+FFFD.
        if text.endswith("\ufffd") and i + 1 < len(until):
            continue
        pieces[waiting], said, waiting = text[said:], len(text), None
    return pieces
