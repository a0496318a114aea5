"""Inspect a checkpoint by its headers and configuration alone."""

import dataclasses
import math

from keras_paligemma import downloads
from keras_paligemma import presets
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.storage.safetensors import Headers
from keras_paligemma.compat import without_values
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.models.backbone import PaliGemmaBackbone


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Args:
        facts: dict of name to fact, in the order of display.
        problems: tuple of str, one per key that does not fit; `None` if the
            weights were not checked.
    """

    facts: dict
    problems: tuple[str, ...] | None


def inspect(source, fields=None):
    """Inspect a checkpoint without reading its weights.

    Args:
        source: str or path, as `from_preset` takes it. On a hub, it is not
            downloaded.
        fields: dict of configuration that the files lack, see `formats.find`.

    Returns:
        `Inspection`.
    """
    is_handle = "://" in str(source)
    if presets.published(source) and not is_handle:
        checkpoint = formats.resolve(source, False, fields)
        handles = presets.describe(source)["handles"].values()
        facts = describe(checkpoint, empty_weights(checkpoint))
        return Inspection(facts | {"published at": ", ".join(handles)}, None)
    if is_handle:
        sizes = downloads.sizes(source)
        checkpoint, has_headers = inspect_handle(source, sizes, fields)
    else:
        checkpoint, has_headers = formats.resolve(source, fields=fields), True
        sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    weights = empty_weights(checkpoint) if checkpoint else {}
    facts = describe(checkpoint, weights) if checkpoint else {}
    if sizes:
        facts["files"] = len(sizes)
        facts["bytes"] = f"{sum(sizes.values()):,}"
    if checkpoint is None or not has_headers:
        facts |= {name: f"{size:,} bytes" for name, size in sizes.items()}
        return Inspection(facts, None)
    with checkpoint.open() as tensors:
        problems = engine.problems(
            weights, checkpoint.rows_for(weights), tensors.shapes
        )
        dtypes = {}
        for key, dtype in tensors.dtypes.items():
            size = math.prod(tensors.shapes[key])
            dtypes[dtype] = dtypes.get(dtype, 0) + size
        facts["tensors"] = len(tensors.shapes)
    facts["values"] = ", ".join(f"{n:,} {dtype}" for dtype, n in dtypes.items())
    return Inspection(facts, tuple(problems))


def inspect_handle(handle, sizes, fields):
    """Inspect a checkpoint on a hub; only small files are downloaded.

    Args:
        handle: str.
        sizes: dict of file name to bytes.
        fields: dict, see `formats.find`.

    Returns:
        `Checkpoint`, or `None` if only the weights reveal the model's
        sizes; and whether it contains the tensors' headers.
    """
    if any(".npz" in name for name in sizes) and not presets.published(handle):
        return None, False
    found = {}
    if any(name.endswith(".safetensors") for name in sizes):
        found = downloads.headers(handle)
    if not found:
        return formats.resolve(handle, False, fields), False
    folder = downloads.download(handle, weights=False)
    return formats.find(folder, fields, False, Headers(found)), True


def describe(checkpoint, weights):
    """Return the facts of a configuration, as a dict of name to fact."""
    backbone = checkpoint.config.backbone
    facts = {
        "format": checkpoint.format or "known by its name",
        "variant": checkpoint.variant or "none of the published",
        "parameters": f"{engine.count(dequantized(weights)):,}",
        "image size": backbone.image_size,
        "tokenizer": checkpoint.tokenizer or "none beside it",
    }
    for tower in ("vision_encoder", "text_decoder"):
        fields = dataclasses.asdict(getattr(backbone, tower))
        facts[tower] = ", ".join(f"{k}={v}" for k, v in fields.items())
    return facts


def empty_weights(checkpoint):
    """Return names and shapes of a model's weights, without values."""
    with without_values():
        backbone = PaliGemmaBackbone(**checkpoint.config.backbone.to_dict())
    return backbone.weights_by_name()
