"""Texts that are still being generated; texts of single tokens."""

from collections.abc import Sequence
from typing import Any


def cut(text, stop_strings, given=0):
    """Return a text up to the first of its stop strings.

    That is the one that ends first, so that later text changes nothing; of
    those that end together, the longest.

    Args:
        text: str.
        stop_strings: strs.
        given: int, characters of the text that were given. A stop string
            within them does not end it.

    Example:
        >>> cut("a cat. A dog", (". ", "dog"))
        'a cat'
        >>> cut("a cat. A dog", (". ", "dog"), given=7)
        'a cat. A '
    """
    places = [
        (start + len(string), start)
        for string in stop_strings
        if (start := text.find(string, max(0, given - len(string) + 1))) >= 0
    ]
    _, start = min(places, default=(None, None))
    return text[:start]


def settled(text, stop_strings, given=0):
    """Return the part of a text that later tokens cannot change.

    A multi-byte character may be incomplete, and a stop string may have
    begun.

    Example:
        >>> settled("a cat.", (". ",))
        'a cat'
    """
    text = cut(text, stop_strings, given).rstrip("\ufffd")
    begun = [
        length
        for stop in stop_strings
        for length in range(1, len(stop))
        if text.endswith(stop[:length])
    ]
    return text[: len(text) - max(begun, default=0)]


def up_to(texts, length):
    """Return the texts of an answer's tokens, as many as its text has.

    A stop string, which may begin within a token, is not part of the answer.

    Args:
        texts: strs. Bytes behind the first one of a character have no text.
        length: int, characters of the answer.

    Example:
        >>> up_to(["a", " cat.", " A", " dog"], 5)
        ['a', ' cat']
    """
    kept = []
    for text in texts:
        if text and not length:
            break
        kept.append(text[:length])
        length -= len(kept[-1])
    return kept


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
