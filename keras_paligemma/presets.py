"""Presets: from a name, folder or hub handle to a config and its files.

A preset is data: `presets/<name>.json` describes a published model, a folder
holds a model in this package's own format. No model class is imported here.
"""

import difflib
import functools
import glob
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal
from typing import overload

from keras_paligemma import atomic
from keras_paligemma import downloads
from keras_paligemma import shipped
from keras_paligemma.checked import shown
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import read_json

HEADER = {"format": "keras_paligemma", "format_version": 1}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
# All files that `save_to_preset` may have written.
WRITTEN = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", TOKENIZER)
WRITTEN += ("model-*-of-*.safetensors",)

_HERE = shipped.folder("presets")


def names() -> tuple[str, ...]:
    """List the presets, sorted: published models and embedded ones."""
    embedded = {path.parent.name for path in _HERE.glob(f"*/{CONFIG}")}
    return tuple(sorted(_described() | embedded))


def _described() -> set[str]:
    return {path.stem for path in _HERE.glob("*.json")}


def describe(name: str) -> dict:
    """Return the description of a preset: sizes, licence, origin of weights.

    Args:
        name: str, one of `names()`.

    Returns:
        dict with `name`, `backbone`, `preprocessor`; for a published model
        also `description`, `license`, `parameters` (exact), `handles`.

    Raises:
        ValueError: unknown name, with suggestions.

    Example:

    >>> describe("pali_gemma2_pt_28b_224")["parameters"]
    27650192112
    """
    if name not in names():
        raise ValueError(_unknown(name))
    path = _HERE / f"{name}.json"
    return read_json(path if path.is_file() else _HERE / name / CONFIG)


@functools.cache
def config(name: str) -> ModelConfig:
    """Return the configuration of a preset; see `describe`."""
    fields = describe(name)
    parts = {key: fields[key] for key in ("name", "backbone", "preprocessor")}
    return ModelConfig.from_dict(parts, name)


def describe_all() -> dict[str, dict]:
    """Return the descriptions of all presets, with KerasHub's `metadata`.

    Returns:
        dict of name to the dict of `describe`, with `metadata` added: a dict
        of `description` and `params` (exact; `None` for an embedded model).
    """
    described = {name: describe(name) for name in names()}
    for preset in described.values():
        preset["metadata"] = {
            "description": preset.get("description", ""),
            "params": preset.get("parameters"),
        }
    return described


def variant(backbone: dict) -> str | None:
    """Find the published model with the sizes of a configuration.

    Args:
        backbone: dict of fields, see `BackboneConfig`; missing fields of the
            towers are not compared.

    Returns:
        Name of a preset, preferably of the same picture size; `None` if no
        published model has these sizes.
    """
    towers = ("vision_encoder", "text_decoder")
    known = {name: config(name).backbone.to_dict() for name in names()}
    matching = [
        name
        for name, fields in known.items()
        if all(fields[key] == fields[key] | backbone[key] for key in towers)
    ]

    def order(name):
        other_size = known[name]["image_size"] != backbone["image_size"]
        # Pretrained models come before their transfers.
        return other_size, "_pt_" not in name, name

    return min(matching, key=order, default=None)


def published(source: str | Path) -> str | None:
    """Return the published model's name for a name or handle, else `None`.

    A `Path` is a folder, even if a model has its name.
    """
    if not isinstance(source, str):
        return None
    if "://" in source:
        return _handles().get(source)
    return source if source in _described() else None


@overload
def locate(
    source: str | Path,
    load_weights: Literal[True] = True,
    tokenizer: bool = False,
) -> Path: ...


@overload
def locate(
    source: str | Path, load_weights: bool, tokenizer: bool = False
) -> Path | None: ...


def locate(
    source: str | Path, load_weights: bool = True, tokenizer: bool = False
) -> Path | None:
    """Find a model's folder or file; download it if it is on a hub.

    Args:
        source: preset name; path of a folder or file; or handle, `hf://…`,
            `kaggle://…`, `gs://…`.
        load_weights: bool, download weights too. A published model's name is
            looked up on Hugging Face first, then on Kaggle.
        tokenizer: bool, download the tokenizer of a published model even
            without its weights; its config comes with this package.

    Returns:
        `pathlib.Path`; `None` if nothing of a published model is needed.

    Raises:
        ValueError: unknown source.
        OSError: the download failed.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            "A model is found by a name or a path. Received: "
            f"{shown(source)}. Expected: one of `presets.names()`, a handle, "
            "or a folder."
        )
    name = published(source)
    if name and not load_weights and not tokenizer:
        return None
    if isinstance(source, str) and "://" in source:
        return downloads.download(source, load_weights)
    if name:
        return _fetch(describe(name), load_weights)
    if source in names():
        return _HERE / source
    path = Path(os.path.expanduser(source))
    try:
        pieces = f"{glob.escape(path.name)}.part*"
        if path.exists() or any(path.parent.glob(pieces)):
            return path
    except (OSError, ValueError):
        pass  # Not a valid path.
    raise ValueError(_unknown(source))


def _fetch(preset: dict, weights: bool) -> Path:
    """Download a published model from the first hub that works."""
    refusals = []
    for key in ("huggingface_transformers", "kaggle_keras"):
        try:
            return downloads.download(preset["handles"][key], weights)
        except (ImportError, OSError) as error:
            refusals.append(str(error))
    listed = "\n".join(refusals)
    raise OSError(
        f"The files of {preset['name']!r} do not come with this package. "
        f"They are published under the {preset['license']}, and no hub gave "
        f"them:\n{listed}\nTo build the model without its weights, pass "
        "`load_weights=False`."
    )


def replaced(folder: str | Path) -> AbstractContextManager[Path]:
    """Replace a preset's files, all at once.

    Args:
        folder: path, new, empty, or a preset of this package; files of other
            names are kept.

    Returns:
        Context manager that yields the folder to write into; see
        `atomic.whole_folder`.

    Raises:
        ValueError: the folder holds another format.
    """
    folder = atomic.local(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Expected: a folder.")
    path = atomic.current(folder, CONFIG) / CONFIG
    ours = path.is_file() and _is_ours(path)
    existing = sorted(
        file.name for name in WRITTEN for file in folder.glob(name)
    )
    if existing and not ours:
        raise ValueError(
            f"{folder} holds {', '.join(existing)}, which `save_to_preset` did "
            "not write and would replace. Expected: a folder without, or a "
            "preset of this package. Move them or choose another folder."
        )
    return atomic.whole_folder(folder, CONFIG, WRITTEN)


def _is_ours(path: Path) -> bool:
    try:
        found = read_json(path)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == HEADER["format"]


def write_config(folder: str | Path, config: ModelConfig) -> Path:
    """Write `config.json` for `read_folder`; create the folder if missing."""
    path = Path(folder) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(HEADER | config.to_dict(), indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def read_folder(folder: Path, load_weights: bool = True) -> ModelConfig:
    """Read the config of a folder that `save_to_preset` wrote.

    Args:
        folder: `pathlib.Path`.
        load_weights: bool, whether weights and tokenizer must exist.

    Raises:
        ValueError: missing file or invalid config.
    """
    needed = [CONFIG, WEIGHTS, TOKENIZER] if load_weights else [CONFIG]
    config = None
    if (folder / CONFIG).is_file():
        # Checked first: a folder of another format lacks the rest as well.
        config = _read_config(folder / CONFIG)
        if config.preprocessor is None:
            needed = [file for file in needed if file != TOKENIZER]
    if (folder / f"{WEIGHTS}.index.json").is_file():
        needed = [file for file in needed if file != WEIGHTS]
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing or config is None:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected: a folder that "
            "`save_to_preset` wrote. Save again, or copy all of it."
        )
    return config


def _read_config(path: Path) -> ModelConfig:
    found = read_json(path)
    fields = found if isinstance(found, dict) else {}
    problems = [
        f"expected {key}={value!r}, received {shown(fields.get(key))}"
        for key, value in HEADER.items()
        if fields.get(key) != value
    ]
    if not problems:
        fields = {key: fields[key] for key in fields.keys() - HEADER}
        # Files of this package have all fields of the published presets.
        example = describe("pali_gemma2_pt_3b_224")
        wanted = {
            "name": "",
            "backbone": example["backbone"] | {"dtype": ""},
            "preprocessor": example["preprocessor"],
        }
        if fields.get("preprocessor", 0) is None:
            wanted["preprocessor"] = None
        problems = _missing(fields, wanted)
    if problems:
        raise ValueError(
            f"{path} is no config of this package: {'; '.join(problems)}. A "
            "newer format_version needs a newer keras_paligemma."
        )
    return ModelConfig.from_dict(fields, path)


def _missing(found: object, wanted: dict, prefix: str = "") -> list[str]:
    """List the fields that are missing in a nested dict."""
    found = found if isinstance(found, dict) else {}
    problems = [f"{prefix}{key} is missing" for key in wanted.keys() - found]
    for key in wanted.keys() & found:
        if isinstance(wanted[key], dict):
            problems += _missing(found[key], wanted[key], f"{prefix}{key}.")
    return sorted(problems)


@functools.cache
def _handles() -> dict[str, str]:
    """Return a dict of the published models' handles to preset names."""
    return {
        handle: path.stem
        for path in _HERE.glob("*.json")
        for handle in read_json(path).get("handles", {}).values()
    }


def _unknown(source: str | Path) -> str:
    near = difflib.get_close_matches(str(source)[:80], names(), cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"There is no preset and no folder {shown(str(source))}.{meant} "
        "Expected: one of `presets.names()`, a handle ('hf://…', "
        "'kaggle://…'), or a folder written by `save_to_preset`; a relative "
        f"path starts at {str(Path.cwd())!r}."
    )
