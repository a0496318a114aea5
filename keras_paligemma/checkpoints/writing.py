"""Write weights and a configuration in any format, without a model."""

import functools
from dataclasses import replace

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.finite import cast
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.compat import process
from keras_paligemma.compat import wait_for_all

# Dtypes of a file, unless it keeps those of the weights.
DTYPES = ("float32", "bfloat16", "float16")


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
    """Write a checkpoint, with one array or one safetensors file in memory.

    The write is atomic, even if the process is killed: readers find the whole
    new checkpoint or the previous state, see `atomic.whole_folder`.

    Args:
        path: str or path of a folder; for big_vision, of a file "….npz". An
            older preset of this package is replaced, and other files are kept;
            for the other formats a folder must be new or empty.
        to: str, one of `formats.FORMATS`.
        config: `ModelConfig`.
        weights: dict of name to `Weight` or `LazyTensor`.
        proto: bytes of the SentencePiece model; `None` writes no tokenizer.
        name: str, name of the model in `config.json`; that of the folder if
            `None`.
        dtype: "float32", "bfloat16", "float16", or `None` for the dtype of
            the weights.
        piece_size: int, bytes of a piece of a big_vision file, or of a shard
            of our preset.

    Raises:
        ValueError: an unknown format, an option or a part of the model that
            the format lacks, or values out of the range of `dtype`.
    """
    backbone = config.backbone
    _check_options(to, backbone, dtype, piece_size)
    path = atomic.local(path)
    if dtype is not None:
        config = replace(config, backbone=replace(backbone, dtype=dtype))
    if to == "big_vision":
        rows = big_vision.rows(backbone.text_decoder.use_post_norms)
        save = functools.partial(npz.write_npz, path, piece_size=piece_size)
    elif to == "transformers":
        rows = hugging_face.rows(backbone)
        save = functools.partial(
            hugging_face.write, path, config, tokenizer=proto
        )
    elif to == "keras_hub":
        rows = keras_hub.rows(backbone)
        save = functools.partial(keras_hub.write, path, config, tokenizer=proto)
    else:
        rows = [engine.Row(key, key) for key in weights]
        name = config.name or name or path.resolve().name
        config = replace(config, name=name)
        save = functools.partial(
            _write_preset, path, config, proto=proto, piece_size=piece_size
        )
    arrays = _arrays(weights, rows, dtype)
    if process()[0] == 0:
        save(arrays=arrays)
    else:
        # All processes gather the sharded arrays; the first one writes them.
        for _ in arrays:
            pass
    wait_for_all("a checkpoint is written")


def _check_options(to, backbone, dtype, piece_size):
    """Raise if an option is invalid or the format cannot hold the model."""
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
    if piece_size is not None and piece_size < 1:
        raise ValueError(
            "`piece_size` is a positive number of bytes. Received: "
            f"{piece_size!r}."
        )
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"Unknown dtype of a file. Expected: one of {', '.join(DTYPES)}, "
            f"or None for that of the weights. Received: {dtype!r}."
        )
    bits = backbone.quantization
    if bits is not None and (to != "keras" or dtype is not None):
        raise ValueError(
            "Kernels of few bits are written as they are, by `save_to_preset` "
            f"alone. Received: a model of {bits} for {to!r} with "
            f"dtype={dtype}. Load the checkpoint that it was made from without "
            "`quantize`, and write that."
        )
    if backbone.lora is not None and to != "keras":
        raise ValueError(
            f"The format {to!r} has no place for adapters. Received: a model "
            f"with {backbone.lora}. Load it with `from_preset`, then write the "
            "adapter apart with `save_adapter`, or call `adapters.merge()` and "
            "export the model."
        )


def _arrays(weights, rows, dtype):
    """Yield the keys and arrays of a checkpoint, cast to a dtype if any."""
    for key, array in engine.write(weights, rows):
        yield key, array if dtype is None else cast(key, array, dtype)
        del array  # Free the array before the next one is made.


def _write_preset(folder, config, arrays, proto, piece_size):
    size = piece_size or safetensors.SHARD_SIZE
    with presets.replaced(folder) as draft:
        safetensors.write_safetensors(draft, arrays, size)
        if proto is not None:
            (draft / presets.TOKENIZER).write_bytes(proto)
        presets.write_config(draft, config)
