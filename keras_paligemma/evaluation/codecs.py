"""Which codec of masks a model's answers to RefCOCO are written in."""

from pathlib import Path

from keras_paligemma.presets import locate
from keras_paligemma.tasks.mask_codec import MaskCodec

# Widths of the text decoders that the card has numbers of.
SIZES = {2304: "3B", 3584: "10B", 4608: "28B"}
_PUBLISHED = "gs://big_vision/paligemma/vae-oid.npz"


def mask_codec(hidden_dim: int, source: str | Path | None = None) -> MaskCodec:
    """Read the codec of masks of a model.

    Args:
        hidden_dim: int, width of the model's text decoder.
        source: path or handle of a codec's file; `None` takes the embedded
            one, which the nano preset has learned.

    Returns:
        `MaskCodec`.

    Raises:
        ValueError: the model is of a published size, whose codes the embedded
            codec would read as other masks, and no `source` is given.

    Example:

    >>> mask_codec(64) is MaskCodec.embedded()
    True
    """
    if source is not None:
        return MaskCodec.load(locate(source))
    if hidden_dim in SIZES:
        raise ValueError(
            f"Models of the size {SIZES[hidden_dim]} write masks in the codes "
            "of vae-oid.npz. Received: no codec. Expected: --masks "
            f"{_PUBLISHED}, or its path; in Python `decode=MaskCodec.load("
            "path).decode`."
        )
    return MaskCodec.embedded()
