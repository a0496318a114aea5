"""The texts of an answer's tokens, some of which spell a byte."""

import itertools
import re

# One byte of a character that is no token of its own.
BYTE = re.compile("<0x([0-9A-F]{2})>")


def characters(tokens):
    """Return tokens as text in which no byte is spelt, as many as before.

    Args:
        tokens: strs, of `Answered`.

    Returns:
        list of str, as `read_objects` takes it: the first of successive bytes
        holds their characters, the others are empty.
    """
    texts = []
    for are_bytes, run in itertools.groupby(
        tokens, lambda token: BYTE.fullmatch(token) is not None
    ):
        run = list(run)
        if are_bytes:
            data = bytes(int(token[3:5], 16) for token in run)
            # As SentencePiece, which replaces each byte of none.
            text = data.decode(errors="surrogateescape")
            text = re.sub("[\udc80-\udcff]", "\ufffd", text)
            run = [text] + [""] * (len(run) - 1)
        texts += run
    return texts
