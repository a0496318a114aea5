"""Which format a file or folder is in, and what it says before it is read."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import h5_files
from keras_paligemma.checkpoints import hugging_face
from keras_paligemma.checkpoints import keras_hub
from keras_paligemma.checkpoints import keras_hub_config
from keras_paligemma.checkpoints import npz
from keras_paligemma.checkpoints import safetensors_files

FORMATS = ("keras", "transformers", "big_vision", "keras_hub")

# Numbers that no shape tells. Published models are known by their sizes; for
# others these are asked for.
UNTOLD = (
    "query_pre_attention_scalar",
    "attention_logit_soft_cap",
    "final_logit_soft_cap",
)

# No other format knows the two parts of a text.
LENGTHS = {"prompt_length": 64, "response_length": 64}


@dataclasses.dataclass
class Checkpoint:
    """What is known of a checkpoint before any of its values is read.

    Args:
        format: str, one of `FORMATS`.
        config: dict with `backbone` and `preprocessor`, as a preset's.
        rows: list of `engine.Row`, or `None` where their names are ours.
        files: list of `pathlib.Path`, those that hold the weights.
        tokenizer: `pathlib.Path` of the SentencePiece model, or `None`.
        open: function that gives a context manager of the tensors.
        variant: str or `None`, a published model of the same sizes.
    """

    format: str
    config: dict
    rows: list | None
    files: list
    tokenizer: Path | None
    open: Callable
    variant: str | None = None

    def rows_for(self, weights):
        """Give the rows; names that are ours map to themselves."""
        if self.rows is not None:
            return self.rows
        return [engine.Row(name, name) for name in weights]


def resolve(source, load_weights=True, fields=None, tokenizer=False):
    """Find the checkpoint that a source means, fetching it if need be.

    Args:
        source: as `presets.locate` takes it.
        load_weights: bool, `False` for a configuration alone.
        fields: see `find`.
        tokenizer: bool, whether that is wanted without weights as well.

    Returns:
        `Checkpoint`; of a published model without weights with no files.
    """
    path = presets.locate(source, load_weights, tokenizer)
    name = presets.published(source)
    if name and not load_weights:
        beside = path and _tokenizer(path)
        checkpoint = Checkpoint(None, {}, None, [], beside, None, name)
    else:
        checkpoint = find(path, fields, load_weights)
    if name:
        # What is known of it; a file leaves some of this out.
        known = presets.describe(name)
        dtype = checkpoint.config.get("backbone", {}).get("dtype")
        checkpoint.config = {
            "name": name,
            "backbone": known["backbone"] | {"dtype": dtype},
            "preprocessor": known["preprocessor"],
        }
        _set(checkpoint.config["backbone"], fields or {})
    return checkpoint


def find(path, fields=None, load_weights=True, headers=None):
    """Recognise a checkpoint by what is there and read its configuration.

    Args:
        path: str or path of a folder, an `.npz` file, one of its pieces
            `X.npz.part*`, or `X.npz` where only the pieces are.
        fields: dict of fields of the backbone to be set, such as
            `query_pre_attention_scalar`: what is given is not looked for.
        load_weights: bool, `False` lets a folder be without weights.
        headers: tensors, see `engine`, that stand for those of a folder
            without weights; only shapes and dtypes are asked for.

    Returns:
        `Checkpoint`.

    Raises:
        ValueError: no format is recognised; a file is missing or damaged; a
            number can neither be inferred nor was given.
    """
    path = Path(path).expanduser()
    fields = fields or {}
    if path.suffix in (".safetensors", ".h5") and path.is_file():
        raise ValueError(
            f"{path} has no configuration. Expected: the folder that it "
            f"lies in, with its config.json: {path.parent}."
        )
    if not path.is_dir():
        checkpoint = _big_vision(path, fields)
    else:
        # All formats of folders begin with this file.
        path = atomic.current(path, presets.CONFIG)
        format = _recognise(path)
        checkpoint = _READERS[format](path, fields, load_weights, headers)
    if checkpoint.config["preprocessor"] is not None:
        checkpoint.config["preprocessor"] = (
            LENGTHS | checkpoint.config["preprocessor"]
        )
    _set(checkpoint.config["backbone"], fields)
    checkpoint.variant = variant(checkpoint.config["backbone"])
    return checkpoint


def _recognise(folder):
    """Tell the format of a folder."""
    path = folder / "config.json"
    if path.is_file():
        config = presets.read_json(path)
        if not isinstance(config, dict):
            config = {}
        if "format" in config:
            return "keras"
        if "registered_name" in config:
            return "keras_hub"
        if config.get("model_type") == "paligemma":
            return "transformers"
        what = f"a config.json with the keys {sorted(config)}"
    elif any(folder.glob("*.npz*")):
        return "big_vision"
    else:
        names = sorted(one.name for one in folder.iterdir())
        what = f"{names[:10]}{' …' if len(names) > 10 else ''}"
    raise ValueError(
        f"{folder} holds no PaliGemma checkpoint that is known. Expected: a "
        "folder that `save_to_preset` wrote, a PaliGemma of transformers "
        "(config.json with model_type 'paligemma'), a preset of KerasHub, or "
        f"big_vision's .npz or .npz.part* files. Received: {what}."
    )


def _keras(folder, fields, load_weights, headers):
    config = presets.read_folder(folder, load_weights)
    files = safetensors_files.find(folder) if load_weights else []
    low_bit = config["backbone"]["quantization"] is not None
    return Checkpoint(
        "keras",
        config,
        None,
        files,
        _tokenizer(folder),
        _opener(safetensors_files.open_safetensors, files, headers, low_bit),
    )


def _transformers(folder, fields, load_weights, headers):
    config = hugging_face.read_config(folder)
    files = safetensors_files.find(folder) if load_weights else []
    open_all = _opener(safetensors_files.open_safetensors, files, headers)

    @contextlib.contextmanager
    def open_files():
        with open_all() as tensors:
            yield hugging_face.tied(tensors)

    rows = None
    if files or headers:
        with open_files() as tensors:
            rows = hugging_face.rows(config["backbone"], tensors.shapes)
            _set_dtype(config["backbone"], tensors)
    return Checkpoint(
        "transformers", config, rows, files, _tokenizer(folder), open_files
    )


def _keras_hub(folder, fields, load_weights, headers):
    found = keras_hub_config.read(folder, load_weights)
    files = found["weights"] if load_weights else []
    preprocessor = found["preprocessor"]
    if preprocessor is not None:
        # KerasHub crops or pads pictures if told so; the original squeezes.
        preprocessor = {"resize": preprocessor["resize"]}
    config = {"backbone": found["backbone"], "preprocessor": preprocessor}
    open_files = _opener(h5_files.open_h5, files, headers)
    if files or headers:
        with open_files() as tensors:
            _set_dtype(config["backbone"], tensors)
    rows = keras_hub.rows(config)
    return Checkpoint(
        "keras_hub", config, rows, files, found["tokenizer"], open_files
    )


def _opener(open_files, files, headers, *options):
    """Give a function that opens files, or gives what stands for them."""
    if headers is not None:
        return functools.partial(contextlib.nullcontext, headers)
    return functools.partial(open_files, files, *options)


def _tokenizer(folder):
    """Find the SentencePiece model in the folder of any format."""
    names = (
        "tokenizer.model",
        "paligemma_tokenizer.model",
        keras_hub_config.TOKENIZER,
    )
    beside = [folder / name for name in names if (folder / name).is_file()]
    return beside[0] if beside else None


def _big_vision(path, fields, load_weights=True, headers=None):
    folder = path
    if path.is_dir():
        names = sorted(
            {
                str(one).partition(".npz")[0] + ".npz"
                for one in path.glob("*.npz*")
            }
        )
        if len(names) > 1:
            raise ValueError(
                f"{path} holds several checkpoints: {', '.join(names)}. Pass "
                "the path of one."
            )
        path = Path(names[0])
    else:
        folder = path.parent
    files = npz.find_pieces(path)
    open_files = functools.partial(npz.open_npz, files)
    with open_files() as tensors:
        found, rows = big_vision.infer(tensors.shapes)
        _set_dtype(found, tensors)
    config = {
        "name": path.name.partition(".npz")[0],
        "backbone": found,
        "preprocessor": {"resize": "bilinear_antialias"},
    }
    known = variant(found)
    if known is not None:
        sizes = presets.describe(known)["backbone"]
        config["backbone"] = found | {
            tower: sizes[tower] | found[tower] for tower in FIELDS
        }
        config["preprocessor"] = presets.describe(known)["preprocessor"]
    else:
        unknown = [key for key in UNTOLD if key not in fields]
        if unknown:
            raise ValueError(
                f"{path} has the sizes of no published model, and its shapes "
                f"do not tell {', '.join(unknown)}. Pass them by keyword; "
                "PaliGemma 2 has soft caps of 50.0 and 30.0 and mostly "
                f"head_dim ({found['text_decoder']['head_dim']} here) as the "
                "scalar; PaliGemma 1 has None, None and head_dim."
            )
    return Checkpoint(
        "big_vision", config, rows, files, _tokenizer(folder), open_files
    )


_READERS = {
    "keras": _keras,
    "transformers": _transformers,
    "big_vision": _big_vision,
    "keras_hub": _keras_hub,
}


def variant(backbone):
    """Find the published model whose sizes a configuration has.

    Args:
        backbone: dict of fields; those of the towers that are missing are not
            compared.

    Returns:
        Name of a preset, one of the same picture size if there is one; `None`
        if no published model has these sizes.
    """
    matching = []
    for name in presets.names():
        known = presets.describe(name)["backbone"]
        towers = ("vision_encoder", "text_decoder")
        if all(known[one] == known[one] | backbone[one] for one in towers):
            matching.append(
                (known["image_size"] != backbone["image_size"], name)
            )
    # Pretrained models come before their transfers.
    matching.sort(key=lambda one: (one[0], "_pt_" not in one[1], one[1]))
    return matching[0][1] if matching else None


def _set(backbone, fields):
    """Put fields that a caller gave into the configuration of their tower."""
    for key, value in fields.items():
        homes = [
            backbone[tower]
            for tower in ("vision_encoder", "text_decoder")
            if key in FIELDS[tower]
        ]
        if len(homes) != 1:
            names = sorted(FIELDS["vision_encoder"] ^ FIELDS["text_decoder"])
            raise ValueError(
                f"Not a field that can be given. Received: {key!r}. Expected "
                f"one of {names}."
            )
        homes[0][key] = value


def _fields():
    example = presets.describe("pali_gemma2_pt_3b_224")["backbone"]
    return {
        tower: set(example[tower])
        for tower in ("vision_encoder", "text_decoder")
    }


FIELDS = _fields()


def _set_dtype(backbone, tensors):
    """Keep the dtype of most of the file's values."""
    sizes = {}
    for key, dtype in tensors.dtypes.items():
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensors.shapes[key])
    if sizes:
        backbone["dtype"] = max(sizes, key=sizes.get)
