"""Recognise the format of a file or folder, and find its checkpoint."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.checkpoints.checkpoint import Checkpoint
from keras_paligemma.checkpoints.readers import NPZ
from keras_paligemma.checkpoints.readers import PUBLISHED_RESIZE
from keras_paligemma.checkpoints.readers import READERS
from keras_paligemma.checkpoints.readers import find_tokenizer
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.config import read_json

FORMATS = tuple(READERS)

# Files that cannot be read, by suffix: what they are and how to convert them.
TORCH = (
    "a pickle of Torch, which can run any code when it is loaded. Load it with "
    "the program that wrote it, and save it with transformers' "
    "`save_pretrained(folder)`, which writes safetensors"
)
UNREADABLE = {
    ".gguf": (
        "a GGUF file of llama.cpp, whose weights are quantised. Load the model "
        "that it was made from, with `quantize='int4'` or 'int8'"
    ),
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".pkl"), TORCH),
    ".keras": (
        "a model that Keras saved whole. Load it with "
        "`keras.models.load_model`, and write it with `save_to_preset(folder)`"
    ),
}


def resolve(source, load_weights=True, fields=None, tokenizer=False):
    """Find the checkpoint of a source, downloading it if necessary.

    Args:
        source: str or path, as in `presets.locate`.
        load_weights: bool, `False` for the configuration alone.
        fields: see `find`.
        tokenizer: bool, whether the tokenizer is needed even without weights;
            or a source, as in `presets.locate`, of a tokenizer to use instead
            of the checkpoint's.

    Returns:
        `Checkpoint`. If `load_weights` is `False`, it has no files for a
        published model.
    """
    given = None if isinstance(tokenizer, bool) else tokenizer
    path = presets.locate(source, load_weights, tokenizer is True)
    name = presets.published(source)
    if name and not load_weights:
        beside = path and find_tokenizer(path)
        checkpoint = Checkpoint(None, presets.config(name), tokenizer=beside)
    else:
        checkpoint = find(path, fields, load_weights)
    if name:
        # The published configuration; files may omit some of its fields.
        known, dtype = presets.config(name), checkpoint.config.backbone.dtype
        backbone = known.backbone.with_fields(**fields or {})
        checkpoint.config = replace(
            known, backbone=replace(backbone, dtype=dtype)
        )
        checkpoint.published = name
        checkpoint.assumed.pop("resize", None)
    if given is not None:
        checkpoint.tokenizer = presets.locate(given)
        if checkpoint.config.preprocessor is None:
            _assume_preprocessor(checkpoint, PUBLISHED_RESIZE, source)
    return checkpoint


def find(path, fields=None, load_weights=True, headers=None):
    """Recognise the format of a checkpoint and read its configuration.

    Args:
        path: str or path of a folder, an `.npz` file, one of its pieces
            `X.npz.part*`, or `X.npz` if only its pieces exist.
        fields: dict of fields of the backbone that override the checkpoint's,
            such as `query_pre_attention_scalar`.
        load_weights: bool; `False` also accepts a folder without weights.
        headers: tensors, see `engine`, to use instead of the files of a
            folder without weights; only their shapes and dtypes are read.

    Returns:
        `Checkpoint`.

    Raises:
        ValueError: no format is recognised; a file is missing or damaged; a
            field can neither be inferred nor is in `fields`.
    """
    path = Path(os.path.expanduser(path))
    fields = fields or {}
    if path.is_file() and path.suffix in UNREADABLE:
        raise ValueError(f"{path} is {UNREADABLE[path.suffix]}.")
    if path.suffix in (".safetensors", ".h5") and path.is_file():
        raise ValueError(
            f"{path} has no configuration. Expected: the folder that it "
            f"lies in, with its config.json: {path.parent}."
        )
    with _naming(path):
        format = "big_vision"
        if path.is_dir():
            # Folders of all other formats have `config.json`.
            path = atomic.current(path, presets.CONFIG)
            format = _recognise(path)
        checkpoint = READERS[format](path, fields, load_weights, headers)
    config = checkpoint.config
    backbone = config.backbone.with_fields(**fields)
    checkpoint.config = replace(config, backbone=backbone)
    if checkpoint.format != "keras" and config.preprocessor is not None:
        _set_preprocessor(checkpoint, config.preprocessor.resize)
    elif checkpoint.format == "transformers":
        # The default of transformers' processor.
        _assume_preprocessor(checkpoint, "bicubic", path)
    elif checkpoint.format == "keras_hub" and checkpoint.tokenizer is not None:
        _assume_preprocessor(checkpoint, PUBLISHED_RESIZE, path)
    return checkpoint


@contextlib.contextmanager
def _naming(path):
    """Add the checkpoint's path to error messages that lack it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _assume_preprocessor(checkpoint, resize, source):
    """Set a default preprocessor, and note it in `checkpoint.assumed`."""
    preprocessor = _set_preprocessor(checkpoint, resize)
    checkpoint.assumed["resize"] = (
        f"{source} does not say how pictures and text are prepared. Taken: "
        f"resize={resize!r}, prompt_length={preprocessor.prompt_length}, "
        f"response_length={preprocessor.response_length}."
    )


def _set_preprocessor(checkpoint, resize):
    """Set a preprocessor with a resize rule.

    Other formats do not store the lengths of prompt and response. The lengths
    of the published model with the same sizes are used.
    """
    preprocessor = PreprocessorConfig(resize)
    variant = checkpoint.variant
    if variant is not None:
        known = presets.config(variant).preprocessor or preprocessor
        preprocessor = replace(known, resize=resize)
    checkpoint.config = replace(checkpoint.config, preprocessor=preprocessor)
    return preprocessor


def _recognise(folder):
    """Return the format of a folder."""
    path = folder / "config.json"
    if path.is_file():
        config = read_json(path)
        if not isinstance(config, dict):
            config = {}
        if "format" in config:
            return "keras"
        if "registered_name" in config:
            return "keras_hub"
        if config.get("model_type") == "paligemma":
            return "transformers"
        what = f"a config.json with the keys {sorted(config)[:10]}"
    elif any(folder.glob(NPZ)):
        return "big_vision"
    else:
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            if Path(name).suffix in UNREADABLE:
                raise ValueError(
                    f"{folder / name} is {UNREADABLE[Path(name).suffix]}."
                )
        what = f"{names[:10]}{' …' if len(names) > 10 else ''}"
    raise ValueError(
        f"{folder} holds no PaliGemma checkpoint that is known. Expected: a "
        "folder that `save_to_preset` wrote, a PaliGemma of transformers "
        "(config.json with model_type 'paligemma'), a preset of KerasHub, or "
        f"big_vision's .npz or .npz.part* files. Received: {what}."
    )
