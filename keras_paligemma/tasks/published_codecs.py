"""The mask codec that a model's answers are written in."""

from pathlib import Path

from keras_paligemma.presets import locate
from keras_paligemma.tasks.mask_codec import MaskCodec

# Text decoder width to the model size that the card reports.
SIZES = {2304: "3B", 3584: "10B", 4608: "28B"}
PUBLISHED = "gs://big_vision/paligemma/vae-oid.npz"


def load_codec(source: str | Path) -> MaskCodec:
    """Read the `MaskCodec` of a path or handle."""
    return MaskCodec.load(locate(source))


def mask_codec(hidden_dim: int, source: str | Path | None = None) -> MaskCodec:
    """Return the mask codec of a model.

    Args:
        hidden_dim: int, width of the model's text decoder.
        source: str or path, path or handle of a codec file; `None` takes the
            embedded codec, which the nano preset was trained with.

    Returns:
        `MaskCodec`.

    Raises:
        ValueError: the model is of a published size, whose codes the embedded
            codec would decode wrongly, and no `source` is given.

    Example:

    >>> mask_codec(64) is MaskCodec.embedded()
    True
    """
    if source is not None:
        return load_codec(source)
    if hidden_dim in SIZES:
        raise ValueError(
            f"Models of the size {SIZES[hidden_dim]} write masks in the codes "
            "of vae-oid.npz, and the nano preset's codec would make other "
            "shapes of them. Received: no codec. Expected: `MaskCodec.load("
            f"path)` of {PUBLISHED}; commands take its path or handle as "
            "--codec or --masks."
        )
    return MaskCodec.embedded()
