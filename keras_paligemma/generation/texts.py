"""Texts that are still being generated."""


def cut(text, stop_strings):
    """Return a text up to the first of its stop strings.

    Example:
        >>> cut("a cat. A dog", (". ", "dog"))
        'a cat'
    """
    places = [text.find(one) for one in stop_strings]
    return text[: min((one for one in places if one >= 0), default=None)]


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
