"""Weights and configuration written in any format."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_paligemma import presets
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.compat import process
from keras_paligemma.compat import wait_for_all
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig


def export(path, to, backbone, preprocessor=None, bare=False, **options):
    """Write a model in one of `formats.FORMATS`.

    Args:
        path: str or path; see `write`.
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


def save_backbone(backbone, preset_dir, max_shard_size=10):
    """Write a backbone alone; see `save_to_preset`."""
    size = _piece_size(max_shard_size)
    export(preset_dir, "keras", backbone, piece_size=size)


def _piece_size(max_shard_size):
    """Give the bytes of a file, of GiB or of `None` for one file."""
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
    options = {"dtype": dtype, "piece_size": piece_size}
    export(path, "big_vision", model.backbone, **options)


def export_to_serve(model, filepath, format="savedmodel"):
    """Write what runs without this package; see `export.targets.export`.

    Args:
        filepath: str or path of a folder that is new or empty.
        format: "savedmodel", "stablehlo", "onnx", "openvino" or "litert".
    """
    # By name: that package stands above the models.
    above = importlib.import_module("keras_paligemma.export")
    above.export(model, filepath, format)


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


def write(
    path,
    to,
    config,
    weights,
    proto=None,
    *,
    name=None,
    dtype=None,
    piece_size=None,
):
    """Write weights, one array, or one file of safetensors, in memory.

    Killed at any time, what readers find is whole or nothing, and in place of
    an older preset of ours that one or the new one: `atomic.whole_folder`.

    Args:
        path: str or path: a folder, of big_vision a file "….npz". A preset of
            ours is replaced, and files of other names stay; for the other
            formats a folder must be new or empty.
        to: str, one of `formats.FORMATS`.
        config: `ModelConfig`.
        weights: dict of name to `Weight` or `LazyTensor`.
        proto: bytes of the SentencePiece model, or `None`: then the folder is
            written without a tokenizer.
        name: str, name of the model in a config of ours; the folder's if
            `None`.
        dtype: "float32", "bfloat16", "float16", or `None` for the weights'.
        piece_size: int, bytes of a piece of a big_vision file, or of a shard of
            a preset of ours.

    Raises:
        ValueError: unknown format; an option that it does not have.
    """
    if to not in formats.FORMATS:
        raise ValueError(
            f"Unknown format. Received: {to!r}. Expected one of "
            f"{formats.FORMATS}."
        )
    if piece_size is not None and to not in ("big_vision", "keras"):
        raise ValueError(
            "Only big_vision's files and our own come in pieces. Received: "
            f"piece_size={piece_size} for {to!r}."
        )
    path = Path(path)
    backbone = config.backbone
    quantization = backbone.quantization
    if quantization is not None and (to != "keras" or dtype is not None):
        raise ValueError(
            f"Kernels of few bits are written as they are, by `save_to_preset` "
            f"alone. Received: a model of {quantization} for {to!r} with "
            f"dtype={dtype}. Load the checkpoint that it was made from without "
            "`quantize`, and write that."
        )
    if dtype is not None:
        config = replace(config, backbone=replace(backbone, dtype=dtype))

    def arrays(rows):
        for key, array in engine.write(weights, rows):
            yield key, array if dtype is None else cast(array, dtype)
            del array  # Before the next one is made.

    if to == "big_vision":
        rows = big_vision.rows(backbone.text_decoder.use_post_norms)
    elif to == "transformers":
        rows = hugging_face.rows(backbone)
    elif to == "keras_hub":
        rows = keras_hub.rows(backbone)
    else:
        rows = [engine.Row(key, key) for key in weights]
        name = config.name or name or path.resolve().name
        config = replace(config, name=name)
    found = arrays(rows)
    if process()[0] > 0:
        # All processes gather what is sharded over them, the first writes.
        for _ in found:
            pass
    elif to == "big_vision":
        npz.write_npz(path, found, piece_size)
    elif to == "transformers":
        hugging_face.write(path, config, found, proto)
    elif to == "keras_hub":
        keras_hub.write(path, config, found, proto)
    else:
        _write_ours(path, config, found, proto, piece_size)
    wait_for_all("a checkpoint is written")


def _write_ours(folder, config, arrays, proto, piece_size):
    sizes = {} if piece_size is None else {"max_shard_size": piece_size}
    with presets.replaced(folder) as draft:
        safetensors.write_safetensors(draft, arrays, **sizes)
        if proto is not None:
            (draft / presets.TOKENIZER).write_bytes(proto)
        presets.write_config(draft, config)


def cast(array, dtype):
    """Give an array of floats in another dtype, bfloat16 included."""
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return array.astype(wanted, copy=False)
