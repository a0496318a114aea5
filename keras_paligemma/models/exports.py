"""Models written in any format."""

import sys
from dataclasses import replace

from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.checkpoints.writing import write
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig


def export(path, to, backbone, preprocessor=None, bare=False, **options):
    """Write a model in one of `formats.FORMATS`.

    Args:
        path: str or path; see `checkpoints.writing.write`.
        to: str, the format.
        backbone: `PaliGemmaBackbone`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`.
        bare: bool, leave the adapter in use out.
        **options: `name`, `dtype` and `piece_size` of `write`.

    Raises:
        ValueError: the format has no place for something of the model.
    """
    with backbone.turns:
        lora = None if bare else backbone.adapters.config()
        if lora is not None and to != "keras":
            raise ValueError(
                f"The format {to!r} has no place for adapters. Received: a "
                f"model with {lora}. Write them apart with `save_adapter`, or "
                "call `adapters.merge()` first."
            )
        if backbone.adapters.has_own_head() and not bare:
            raise ValueError(
                "The adapter in use brings a head that is not the embedding's "
                f"table, and {to!r} has one table for both. Received: "
                f"{backbone.adapters.active!r}. Write it with `save_adapter`, "
                "and the model with all adapters off: `adapters.select(None)`."
            )
        architecture = backbone.architecture()
        config = ModelConfig(
            backbone=architecture if lora else replace(architecture, lora=None),
            preprocessor=_config_of(preprocessor),
        )
        proto = preprocessor.tokenizer.proto if preprocessor else None
        weights = backbone.weights_by_name()
        if bare:
            weights = backbone.adapters.base_weights()
        # Merged adapters are in the kernels; the head is the table.
        left_out = HEAD if lora is not None else "/adapter_"
        weights = {
            name: weight
            for name, weight in weights.items()
            if left_out not in name
        }
        write(path, to, config, weights, proto, **options)


def save_to_preset(model, preset_dir, max_shard_size=10):
    """Write configuration, weights and tokenizer to a directory.

    A preset that is there is replaced: killed at any time, `from_preset` finds
    the old one or the new one, whole. Files of other names stay. Of several
    adapters the one in use is written, and the weights that it brings whole as
    the base's; `save_adapter` writes each.

    Args:
        preset_dir: str or path; `from_preset` loads it, exactly.
        max_shard_size: float, GiB of a file at most. Files are of 2 GB in any
            case, since one is whole in memory while it is written; `None`
            gives one file of any size.

    Raises:
        ValueError: the directory holds a checkpoint of another format.
    """
    size = _piece_size(max_shard_size)
    parts = model.backbone, model.preprocessor
    export(preset_dir, "keras", *parts, piece_size=size)


def save_backbone(backbone, preset_dir, max_shard_size: float | None = 10):
    """Write a backbone alone; see `save_to_preset`."""
    size = _piece_size(max_shard_size)
    export(preset_dir, "keras", backbone, piece_size=size)


def _piece_size(max_shard_size):
    """Return the bytes of a file, of GiB or of `None` for one file."""
    if max_shard_size is None:
        return sys.maxsize
    if not max_shard_size > 0:
        raise ValueError(
            "`max_shard_size` is a positive number of GiB, or None. Received: "
            f"{max_shard_size!r}."
        )
    return min(int(max_shard_size * 2**30), safetensors.SHARD_SIZE)


def export_to_transformers(model, path):
    """Write a folder that transformers loads, processor included.

    Args:
        path: str or path of a folder that is not there yet.
    """
    export(path, "transformers", model.backbone, model.preprocessor)


def export_to_keras_hub(model, path):
    """Write a preset that KerasHub loads.

    Args:
        path: str or path of a folder that is not there yet.
    """
    export(path, "keras_hub", model.backbone, model.preprocessor)


def export_to_big_vision(model, path, dtype=None, piece_size=None):
    """Write big_vision's `.npz`, whole or in pieces.

    Args:
        path: str or path of the file, "….npz".
        dtype: "float32" or "bfloat16"; that of the weights if `None`.
        piece_size: int, bytes of a piece; one file if `None`.
    """
    export(
        path,
        "big_vision",
        model.backbone,
        dtype=dtype,
        piece_size=piece_size,
    )


def export_to_serve(model, filepath, format="savedmodel"):
    """Write what runs without this package; see `export.targets.export`.

    Args:
        filepath: str or path of a folder that is new or empty.
        format: "savedmodel", "stablehlo", "onnx", "openvino" or "litert".
    """
    # Here, since that package stands above the models.
    from keras_paligemma.export.targets import export

    export(model, filepath, format)


def _config_of(preprocessor):
    if preprocessor is None:
        return None
    return PreprocessorConfig(
        resize=preprocessor.image_converter.resize,
        prompt_length=preprocessor.prompt_length,
        response_length=preprocessor.response_length,
        on_long_prompt=preprocessor.on_long_prompt,
        on_long_response=preprocessor.on_long_response,
    )
