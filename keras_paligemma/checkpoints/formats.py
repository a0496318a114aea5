"""Which format a file or folder is in, and what it says before it is read."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.checked import shown
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.finite import Finite
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.keras_hub import config as keras_hub_config
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.checkpoints.storage import h5
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig

FORMATS = ("keras", "transformers", "big_vision", "keras_hub")

# Numbers that no shape tells. Published models are known by their sizes; for
# others these are asked for.
UNTOLD = (
    "query_pre_attention_scalar",
    "attention_logit_soft_cap",
    "final_logit_soft_cap",
)

# How the published models were trained.
PUBLISHED_RESIZE = "bilinear_antialias"

# What is no checkpoint that can be read, by its suffix, and the way to one.
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


@dataclasses.dataclass
class Checkpoint:
    """What is known of a checkpoint before any of its values is read.

    Args:
        format: str, one of `FORMATS`.
        config: `ModelConfig`.
        rows: list of `engine.Row`, or `None` where their names are ours.
        files: list of `pathlib.Path`, those that hold the weights.
        tokenizer: `pathlib.Path` for `read_tokenizer`, or `None`.
        open_files: function that gives a context manager of the tensors.
        variant: str or `None`, a published model of the same sizes.
        added_tokens: dict of id to str, tokens that are not in the
            SentencePiece model.
        assumed: dict of an argument of `from_preset` to a sentence that says
            what is taken in its place, since the checkpoint does not tell.
    """

    format: str | None
    config: ModelConfig
    rows: list | None
    files: list
    tokenizer: Path | None
    open_files: Callable | None
    variant: str | None = None
    added_tokens: dict = dataclasses.field(default_factory=dict)
    assumed: dict = dataclasses.field(default_factory=dict)

    def rows_for(self, weights):
        """Return the rows; names that are ours map to themselves."""
        if self.rows is not None:
            return self.rows
        return [engine.Row(name, name) for name in weights]

    def say_assumed(self, argument):
        """Warn of what is taken in place of an argument that nobody gave."""
        if argument in self.assumed:
            warnings.warn(
                f"{self.assumed[argument]} Pass `{argument}=` for another.",
                stacklevel=4,
            )

    @contextlib.contextmanager
    def open(self, allow_nonfinite=False):
        """Open the tensors, see `engine`.

        Args:
            allow_nonfinite: bool; `False` has a tensor with NaN or infinite
                values refused with a `ValueError` when it is read.
        """
        if self.open_files is None:
            raise ValueError(
                "This checkpoint is a configuration alone. Expected: one that "
                "was found with `load_weights=True`."
            )
        with self.open_files() as tensors:
            if not allow_nonfinite:
                source = (
                    self.files[0].parent if self.files else "The checkpoint"
                )
                tensors = Finite(tensors, source)
            yield tensors


def resolve(source, load_weights=True, fields=None, tokenizer=False):
    """Find the checkpoint that a source means, fetching it if need be.

    Args:
        source: as `presets.locate` takes it.
        load_weights: bool, `False` for a configuration alone.
        fields: see `find`.
        tokenizer: whether that is wanted without weights as well, a bool; or
            the one to take in place of the checkpoint's, as `presets.locate`
            takes it.

    Returns:
        `Checkpoint`; of a published model without weights with no files.
    """
    given = None if isinstance(tokenizer, bool) else tokenizer
    path = presets.locate(source, load_weights, tokenizer is True)
    name = presets.published(source)
    if name and not load_weights:
        beside = path and _tokenizer(path)
        checkpoint = Checkpoint(
            None, presets.config(name), None, [], beside, None
        )
    else:
        checkpoint = find(path, fields, load_weights)
    if name:
        # What is known of it; a file leaves some of this out.
        known, dtype = presets.config(name), checkpoint.config.backbone.dtype
        backbone = known.backbone.with_fields(**fields or {})
        checkpoint.config = replace(
            known, backbone=replace(backbone, dtype=dtype)
        )
        checkpoint.variant = name
        checkpoint.assumed.pop("resize", None)
    if given is not None:
        checkpoint.tokenizer = presets.locate(given)
        if checkpoint.config.preprocessor is None:
            _assume_preprocessor(checkpoint, PUBLISHED_RESIZE, source)
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
    if path.is_file() and path.suffix in UNREADABLE:
        raise ValueError(f"{path} is {UNREADABLE[path.suffix]}.")
    if path.suffix in (".safetensors", ".h5") and path.is_file():
        raise ValueError(
            f"{path} has no configuration. Expected: the folder that it "
            f"lies in, with its config.json: {path.parent}."
        )
    with _naming(path):
        if not path.is_dir():
            checkpoint = _big_vision(path, fields)
        else:
            # All formats of folders begin with this file.
            path = atomic.current(path, presets.CONFIG)
            format = _recognise(path)
            checkpoint = _READERS[format](path, fields, load_weights, headers)
    config = checkpoint.config
    backbone = config.backbone.with_fields(**fields)
    checkpoint.config = replace(config, backbone=backbone)
    checkpoint.variant = variant(backbone.to_dict())
    if checkpoint.format != "keras" and config.preprocessor is not None:
        _set_preprocessor(checkpoint, config.preprocessor.resize)
    elif checkpoint.format == "transformers":
        # What its processor does, unless it is told otherwise.
        _assume_preprocessor(checkpoint, "bicubic", path)
    elif checkpoint.format == "keras_hub" and checkpoint.tokenizer is not None:
        _assume_preprocessor(checkpoint, PUBLISHED_RESIZE, path)
    return checkpoint


@contextlib.contextmanager
def _naming(path):
    """Have every error say which checkpoint it is about."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _assume_preprocessor(checkpoint, resize, source):
    """Give a checkpoint the preprocessor that its files say nothing of."""
    preprocessor = _set_preprocessor(checkpoint, resize)
    checkpoint.assumed["resize"] = (
        f"{source} does not say how pictures and text are prepared. Taken: "
        f"resize={resize!r}, prompt_length={preprocessor.prompt_length}, "
        f"response_length={preprocessor.response_length}."
    )


def _set_preprocessor(checkpoint, resize):
    """Give a checkpoint a preprocessor by its rule to resize.

    No other format knows the two parts of a text: their lengths are those of
    the published model of these sizes.
    """
    preprocessor = PreprocessorConfig(resize)
    if checkpoint.variant is not None:
        known = presets.config(checkpoint.variant).preprocessor or preprocessor
        preprocessor = replace(known, resize=resize)
    checkpoint.config = replace(checkpoint.config, preprocessor=preprocessor)
    return preprocessor


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
        what = f"a config.json with the keys {sorted(config)[:10]}"
    elif any(folder.glob("*.npz*")):
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


def _keras(folder, fields, load_weights, headers):
    config = presets.read_folder(folder, load_weights)
    files = safetensors.find(folder) if load_weights else []
    low_bit = config.backbone.quantization is not None
    return Checkpoint(
        "keras",
        config,
        None,
        files,
        _tokenizer(folder),
        _opener(safetensors.open_safetensors, files, headers, low_bit),
    )


def _transformers(folder, fields, load_weights, headers):
    found = hugging_face.read_config(folder)
    files = safetensors.find(folder) if load_weights else []
    open_all = _opener(safetensors.open_safetensors, files, headers)

    @contextlib.contextmanager
    def open_files():
        with open_all() as tensors:
            yield hugging_face.tied(tensors)

    backbone, tokenizer = found.config.backbone, _tokenizer(folder)
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = folder / "tokenizer.json"
    checkpoint = Checkpoint(
        "transformers",
        found.config,
        None,
        files,
        tokenizer,
        open_files,
        added_tokens=found.added_tokens,
    )
    if files or headers:
        with open_files() as tensors:
            extra = found.num_rows - backbone.text_decoder.vocabulary_size
            extra = max(extra, hugging_face.EXTRA_ROWS)
            checkpoint.rows = hugging_face.rows(backbone, tensors.shapes, extra)
            _set_dtype(checkpoint, tensors, folder)
    return checkpoint


def _keras_hub(folder, fields, load_weights, headers):
    found = keras_hub_config.read(folder, load_weights)
    files = found["weights"] if load_weights else []
    open_files = _opener(h5.open_h5, files, headers)
    checkpoint = Checkpoint(
        "keras_hub",
        found["config"],
        keras_hub.rows(found["config"].backbone),
        files,
        found["tokenizer"],
        open_files,
    )
    if files or headers:
        with open_files() as tensors:
            _set_dtype(checkpoint, tensors, folder)
    return checkpoint


def _opener(open_files, files, headers, *options):
    """Return a function that opens files, or gives what stands for them."""
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
                str(file).partition(".npz")[0] + ".npz"
                for file in path.glob("*.npz*")
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
        inferred, rows = big_vision.infer(tensors.shapes)
        found = BackboneConfig.from_dict(inferred, path)
        known = variant(inferred)
        config = ModelConfig(
            name=path.name.partition(".npz")[0],
            backbone=found,
            preprocessor=PreprocessorConfig(PUBLISHED_RESIZE),
        )
        if known is not None:
            published = presets.config(known)
            backbone = replace(published.backbone, image_size=found.image_size)
            config = replace(published, name=config.name, backbone=backbone)
        elif unknown := [key for key in UNTOLD if key not in fields]:
            raise ValueError(
                f"{path} has the sizes of no published model, and its shapes "
                f"do not tell {', '.join(unknown)}. Pass them by keyword; "
                "PaliGemma 2 has soft caps of 50.0 and 30.0 and mostly "
                f"head_dim ({found.text_decoder.head_dim} here) as the "
                "scalar; PaliGemma 1 has None, None and head_dim."
            )
        checkpoint = Checkpoint(
            "big_vision", config, rows, files, _tokenizer(folder), open_files
        )
        _set_dtype(checkpoint, tensors, path)
    return checkpoint


_READERS = {
    "keras": _keras,
    "transformers": _transformers,
    "big_vision": _big_vision,
    "keras_hub": _keras_hub,
}


def variant(backbone):
    """Find the published model whose sizes a configuration has.

    Args:
        backbone: dict of fields, see `BackboneConfig`; those of the towers
            that are missing are not compared.

    Returns:
        Name of a preset, one of the same picture size if there is one; `None`
        if no published model has these sizes.
    """
    matching = []
    for name in presets.names():
        known = presets.config(name).backbone.to_dict()
        towers = ("vision_encoder", "text_decoder")
        if all(known[key] == known[key] | backbone[key] for key in towers):
            matching.append(
                (known["image_size"] != backbone["image_size"], name)
            )
    # Pretrained models come before their transfers.
    matching.sort(
        key=lambda found: (found[0], "_pt_" not in found[1], found[1])
    )
    return matching[0][1] if matching else None


# What is computed in where a file holds another dtype. float16 ends at 65,504,
# and a model that leaves its range gives NaN.
COMPUTED = {"float16": "bfloat16", "float64": "float32"}
FLOATS = ("float64", "float32", "float16", "bfloat16")


def _set_dtype(checkpoint, tensors, source):
    """Keep the dtype of most of the file's values, but for float16."""
    sizes = {}
    for key, dtype in tensors.dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{source} holds {shown(key)} as {shown(dtype)}. Expected: "
                f"one of {FLOATS}. Save the weights as floats."
            )
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensors.shapes[key])
    if not sizes:
        return
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    dtype = COMPUTED.get(stored, stored)
    config = checkpoint.config
    backbone = replace(config.backbone, dtype=dtype)
    checkpoint.config = replace(config, backbone=backbone)
    if COMPUTED.keys() & sizes:
        checkpoint.assumed["dtype"] = (
            f"{source} holds {' and '.join(sorted(sizes))}. Taken: "
            f"dtype={dtype!r}."
        )
