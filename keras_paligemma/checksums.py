"""Checksums of published files, to detect damaged copies."""

import hashlib
from pathlib import Path

# Size in bytes -> name, SHA-256. The sizes are all different.
KNOWN = {
    4_264_023: (
        "PaliGemma's paligemma_tokenizer.model",
        "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6",
    ),
    4_241_003: (
        "Gemma's tokenizer.model",
        "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2",
    ),
    8_479_556: (
        "PaliGemma's vae-oid.npz",
        "5586010257b8536dddefab65e7755077f21d5672d5674dacf911f73ae95a4447",
    ),
}


def check_published(content: bytes, source: object) -> None:
    """Raise `ValueError` if a file has a published file's size, not its hash.

    A SentencePiece model has no checksum of its own: with a flipped bit it
    still loads, and returns other ids. Files of other sizes are not checked.

    Args:
        content: bytes of the whole file.
        source: path or name, for the error.

    Raises:
        ValueError: the size of a published file with another hash.
    """
    name, wanted = KNOWN.get(len(content), (None, None))
    if name is None:
        return
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise ValueError(
            f"{source} is damaged: it has the {len(content):,} bytes of {name} "
            f"and another content. Expected: SHA-256 {wanted}. Received: "
            f"{found}. Copy or download it again."
        )


def read_checked(path: str | Path) -> bytes:
    """Read a file, with `check_published`."""
    content = Path(path).read_bytes()
    check_published(content, path)
    return content
