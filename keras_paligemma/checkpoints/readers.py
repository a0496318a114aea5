"""Read a `Checkpoint` (configuration, table of names, files) of each format."""

import contextlib
import functools
from dataclasses import replace

from keras_paligemma import presets
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints.checkpoint import Checkpoint
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.keras_hub import config as keras_hub_config
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.checkpoints.storage import h5
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig

# Fields that shapes do not determine. Published models are recognised by their
# sizes; for other models the caller passes these.
NOT_IN_SHAPES = (
    "query_pre_attention_scalar",
    "attention_logit_soft_cap",
    "final_logit_soft_cap",
)

# What may be an `.npz` or a piece of one. Notes and drafts are hidden.
NPZ = "[!.]*.npz*"

# The resize rule that the published models were trained with.
PUBLISHED_RESIZE = "bilinear_antialias"


def _keras(folder, fields, load_weights, headers):
    config = presets.read_folder(folder, load_weights)
    files = safetensors.find(folder) if load_weights else []
    quantized = config.backbone.quantization is not None
    return Checkpoint(
        "keras",
        config,
        files=files,
        tokenizer=find_tokenizer(folder),
        open_files=_opener(
            safetensors.open_safetensors, files, headers, quantized
        ),
    )


def _transformers(folder, fields, load_weights, headers):
    found = hugging_face.read_config(folder)
    files = safetensors.find(folder) if load_weights else []
    open_all = _opener(safetensors.open_safetensors, files, headers)

    @contextlib.contextmanager
    def open_files():
        with open_all() as tensors:
            yield hugging_face.tied(tensors)

    backbone, tokenizer = found.config.backbone, find_tokenizer(folder)
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = folder / "tokenizer.json"
    checkpoint = Checkpoint(
        "transformers",
        found.config,
        files=files,
        tokenizer=tokenizer,
        open_files=open_files,
        added_tokens=found.added_tokens,
    )
    if files or headers:
        with open_files() as tensors:
            extra = found.num_rows - backbone.text_decoder.vocabulary_size
            extra = max(extra, hugging_face.EXTRA_ROWS)
            checkpoint.rows = hugging_face.rows(backbone, tensors.shapes, extra)
            checkpoint.set_dtype(tensors, folder)
    else:
        checkpoint.set_dtype(None, folder)
    return checkpoint


def _keras_hub(folder, fields, load_weights, headers):
    found = keras_hub_config.read(folder, load_weights)
    files = found.weights if load_weights else []
    open_files = _opener(h5.open_h5, files, headers)
    checkpoint = Checkpoint(
        "keras_hub",
        found.config,
        keras_hub.rows(found.config.backbone),
        files,
        found.tokenizer,
        open_files,
    )
    if files or headers:
        with open_files() as tensors:
            checkpoint.set_dtype(tensors, folder)
    else:
        checkpoint.set_dtype(None, folder)
    return checkpoint


def _opener(open_files, files, headers, *options):
    """Return a function that opens the files, or returns `headers` instead."""
    if headers is not None:
        return functools.partial(contextlib.nullcontext, headers)
    return functools.partial(open_files, files, *options)


def find_tokenizer(folder):
    """Find the SentencePiece model in a folder of any format."""
    names = (
        "tokenizer.model",
        "paligemma_tokenizer.model",
        keras_hub_config.TOKENIZER,
    )
    beside = [folder / name for name in names if (folder / name).is_file()]
    return beside[0] if beside else None


def _big_vision(path, fields, load_weights, headers):
    path = _npz_in(path) if path.is_dir() else path
    files = npz.find_pieces(path)
    open_files = functools.partial(npz.open_npz, files)
    with open_files() as tensors:
        inferred, rows = big_vision.infer(tensors.shapes)
        checkpoint = Checkpoint(
            "big_vision",
            _config_of_sizes(inferred, path, fields),
            rows,
            files,
            find_tokenizer(path.parent),
            open_files,
        )
        checkpoint.set_dtype(tensors, path)
    return checkpoint


def _npz_in(folder):
    """Return the path of the only `.npz`, whole or in pieces, of a folder."""
    files = [file.name for file in folder.glob(NPZ)]
    names = sorted({file.partition(".npz")[0] + ".npz" for file in files})
    if len(names) > 1:
        raise ValueError(
            f"{folder} holds several checkpoints: {', '.join(names)}. Pass "
            "the path of one."
        )
    return folder / names[0]


def _config_of_sizes(sizes, path, fields):
    """Return the configuration of a file that stores none.

    Args:
        sizes: dict of the backbone's fields, from `big_vision.infer`.
        path: `pathlib.Path` of the file.
        fields: dict of the backbone's fields that the caller gives.

    Returns:
        `ModelConfig` of the published model of these sizes, if there is one.
    """
    name = path.name.partition(".npz")[0]
    backbone = BackboneConfig.from_dict(sizes, path)
    variant = presets.variant(sizes)
    if variant is not None:
        known = presets.config(variant)
        image_size = backbone.image_size
        backbone = replace(known.backbone, image_size=image_size)
        return replace(known, name=name, backbone=backbone)
    if unknown := [key for key in NOT_IN_SHAPES if key not in fields]:
        raise ValueError(
            f"{path} has the sizes of no published model, and its shapes "
            f"do not tell {', '.join(unknown)}. Pass them by keyword; "
            "PaliGemma 2 has soft caps of 50.0 and 30.0 and mostly "
            f"head_dim ({backbone.text_decoder.head_dim} here) as the "
            "scalar; PaliGemma 1 has None, None and head_dim."
        )
    preprocessor = PreprocessorConfig(PUBLISHED_RESIZE)
    return ModelConfig(name=name, backbone=backbone, preprocessor=preprocessor)


READERS = {
    "keras": _keras,
    "transformers": _transformers,
    "big_vision": _big_vision,
    "keras_hub": _keras_hub,
}
