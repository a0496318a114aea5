"""Texts that are still being written."""


def cut(text, stop_strings):
    """Give a text up to the first of the strings that end it.

    Example:
        >>> cut("a cat. A dog", (". ", "dog"))
        'a cat'
    """
    places = [text.find(one) for one in stop_strings]
    return text[: min((one for one in places if one >= 0), default=None)]


def settled(text, stop_strings):
    """Give the part of a text that later tokens leave as it is.

    A character of several bytes may lack some, and a stop string may have
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
