"""Export models to other formats."""

import math
import sys
from dataclasses import replace
from numbers import Real

from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.checkpoints.writing import write
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.preprocessing.image_converter import check_picture_size


def export(path, to, backbone, preprocessor=None, bare=False, **options):
    """Write a model in a format of `formats.FORMATS`.

    Args:
        path: str or path; see `checkpoints.writing.write`.
        to: str, the format.
        backbone: `PaliGemmaBackbone`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`.
        bare: bool, whether to leave out the active adapter.
        **options: `name`, `dtype` and `piece_size` of `write`.

    Raises:
        ValueError: if the format cannot hold a part of the model.
    """
    # A file has one picture size, for both.
    check_picture_size(preprocessor, backbone.image_size)
    with backbone.turns:
        lora = None if bare else backbone.adapters.config()
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
            preprocessor=config_of(preprocessor),
        )
        proto = preprocessor.tokenizer.proto if preprocessor else None
        weights = backbone.weights_by_name()
        if bare:
            weights = backbone.adapters.base_weights()
        # Merged adapters are part of the kernels; the head is the table.
        left_out = HEAD if lora is not None else "/adapter_"
        weights = {
            name: weight
            for name, weight in weights.items()
            if left_out not in name
        }
        write(path, to, config, weights, proto, **options)


def save_to_preset(model, preset_dir, max_shard_size=10):
    """Write configuration, weights and tokenizer to a preset directory.

    An existing preset is replaced atomically: if the process is killed,
    `from_preset` finds either the old or the new preset. Other files stay. Of
    several adapters, the active one is written; full weights that it replaces
    are written in place of the base's. `save_adapter` writes any adapter.

    Args:
        preset_dir: str or path; `from_preset` restores it exactly.
        max_shard_size: float, largest file in GiB, at most 2 GB in any case,
            since a file is held in memory while it is written. `None` writes
            one file of any size.

    Raises:
        ValueError: if the directory holds a checkpoint of another format, or
            the preprocessor has no image converter.
    """
    size = _piece_size(max_shard_size)
    parts = model.backbone, model.preprocessor
    export(preset_dir, "keras", *parts, piece_size=size)


def save_backbone(backbone, preset_dir, max_shard_size: float | None = 10):
    """Write a backbone alone; see `save_to_preset`."""
    size = _piece_size(max_shard_size)
    export(preset_dir, "keras", backbone, piece_size=size)


def _piece_size(max_shard_size):
    """Return the bytes of a file from GiB, or from `None` for one file."""
    if max_shard_size is None:
        return sys.maxsize
    is_number = isinstance(max_shard_size, Real) and max_shard_size < math.inf
    size = float(min(max_shard_size, 2)) * 2**30 if is_number else 0
    if size < 1:
        raise ValueError(
            "`max_shard_size` is a positive number of GiB, of one byte at "
            f"least, or None. Received: {max_shard_size!r}."
        )
    return min(int(size), safetensors.SHARD_SIZE)


def export_to_transformers(model, path):
    """Write a folder that transformers loads, including the processor.

    Args:
        path: str or path of a folder that does not exist yet.
    """
    export(path, "transformers", model.backbone, model.preprocessor)


def export_to_keras_hub(model, path):
    """Write a preset that KerasHub loads.

    Args:
        path: str or path of a folder that does not exist yet.
    """
    export(path, "keras_hub", model.backbone, model.preprocessor)


def export_to_big_vision(model, path, dtype=None, piece_size=None):
    """Write a `.npz` of big_vision, whole or in pieces.

    Args:
        path: str or path of the file, "….npz".
        dtype: "float32", "bfloat16" or "float16"; that of the weights if
            `None`.
        piece_size: int, bytes of a piece; one file if `None`.

    Raises:
        ValueError: an adapter is active, or float16 cannot hold a value.
    """
    export(
        path,
        "big_vision",
        model.backbone,
        dtype=dtype,
        piece_size=piece_size,
    )


def export_to_serve(model, filepath, format="savedmodel"):
    """Write a model that runs without this package.

    See `export.targets.export`.

    Args:
        filepath: str or path of a new or empty folder.
        format: "savedmodel", "stablehlo", "onnx", "openvino" or "litert".
    """
    # Imported here, since that package is a layer above the models.
    from keras_paligemma.export.targets import export

    export(model, filepath, format)


def config_of(preprocessor):
    """Return the `PreprocessorConfig` of a preprocessor; `None` for `None`."""
    if preprocessor is None:
        return None
    if preprocessor.image_converter is None:
        raise ValueError(
            "A model's files say how pictures are resized. Received: a "
            "preprocessor without an image converter. Expected: one with a "
            "`PaliGemmaImageConverter`. For text alone, write the two parts "
            "into one folder, which `from_preset` reads: "
            "`model.backbone.save_to_preset(folder)`, then "
            "`model.preprocessor.save_to_preset(folder)`."
        )
    return PreprocessorConfig(
        resize=preprocessor.image_converter.resize,
        prompt_length=preprocessor.prompt_length,
        response_length=preprocessor.response_length,
        on_long_prompt=preprocessor.on_long_prompt,
        on_long_response=preprocessor.on_long_response,
    )
