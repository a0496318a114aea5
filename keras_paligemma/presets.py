"""Presets: a name, a folder or a hub's handle to a config and its files.

A preset is data: `presets/<name>.json` describes a published model, a folder
holds one in this package's own format. No model class is known here.
"""

import difflib
import functools
import json
from pathlib import Path

from keras_paligemma import atomic
from keras_paligemma import downloads
from keras_paligemma import shipped

HEADER = {"format": "keras_paligemma", "format_version": 1}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
# What a folder of ours may have been written with.
WRITTEN = (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", TOKENIZER)
WRITTEN += ("model-*-of-*.safetensors",)

_HERE = shipped.folder("presets")


def names() -> tuple[str, ...]:
    """List the presets, sorted: published models and embedded ones."""
    published = {path.stem for path in _HERE.glob("*.json")}
    embedded = {path.parent.name for path in _HERE.glob(f"*/{CONFIG}")}
    return tuple(sorted(published | embedded))


def describe(name: str) -> dict:
    """Read what is known of a preset: sizes, licence, origin of its weights.

    Args:
        name: One of `names()`; a `ValueError` suggests the nearest ones.

    Returns:
        `name`, `backbone`, `preprocessor`; of a published model also
        `description`, `license`, `parameters` (exact), `handles`.

    Example:

    >>> describe("pali_gemma2_pt_28b_224")["parameters"]
    27650192112
    """
    if name not in names():
        raise ValueError(_unknown(name))
    path = _HERE / f"{name}.json"
    return read_json(path if path.is_file() else _HERE / name / CONFIG)


def published(source: str | Path) -> str | None:
    """Give the name of the published model that a name or a handle means."""
    name = _handles().get(source, source)
    return name if (_HERE / f"{name}.json").is_file() else None


def locate(
    source: str | Path, load_weights: bool = True, tokenizer: bool = False
) -> Path | None:
    """Find a model's folder or file; fetch it where it is on a hub.

    Args:
        source: Preset name; folder or file; handle, `hf://…`, `kaggle://…`,
            `gs://…`.
        load_weights: Whether weights are wanted: they are only fetched then.
            For a published model Hugging Face is asked first, then Kaggle; a
            handle says which.
        tokenizer: Whether that of a published model is wanted, if its weights
            are not: all else of it is known.

    Returns:
        The path; `None` where nothing of a published model is wanted.

    Raises:
        ValueError: unknown source.
        OSError: no hub gave the files.
    """
    name = published(source)
    if name and not load_weights and not tokenizer:
        return None
    if isinstance(source, str) and "://" in source:
        return downloads.download(source, load_weights)
    if name:
        return _fetch(describe(name), load_weights)
    if source in names():
        return _HERE / source
    path = Path(source).expanduser()
    if path.exists() or any(path.parent.glob(f"{path.name}.part*")):
        return path
    raise ValueError(_unknown(source))


def _fetch(preset: dict, weights: bool) -> Path:
    """Fetch a published model from the first hub that gives it."""
    refusals = []
    for key in ("huggingface_transformers", "kaggle_keras"):
        try:
            return downloads.download(preset["handles"][key], weights)
        except (ImportError, OSError) as error:
            refusals.append(str(error))
    shown = "\n".join(refusals)
    raise OSError(
        f"The files of {preset['name']!r} do not come with this package. "
        f"They are published under the {preset['license']}, and no hub gave "
        f"them:\n{shown}\nTo build the model without its weights, pass "
        "`load_weights=False`."
    )


def replaced(folder: str | Path):
    """Write a preset's files at once, in place of an older preset's.

    Args:
        folder: New, empty, or one of this package, in which files of other
            names stay as they are.

    Returns:
        Context manager that gives the folder to write into; see
        `atomic.whole_folder`.

    Raises:
        ValueError: the folder is that of another format.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Expected: a folder.")
    config = atomic.current(folder, CONFIG) / CONFIG
    ours = config.is_file() and _is_ours(config)
    held = sorted(one.name for name in WRITTEN for one in folder.glob(name))
    if held and not ours:
        raise ValueError(
            f"{folder} holds {', '.join(held)}, which `save_to_preset` did "
            "not write and would replace. Expected: a folder without, or a "
            "preset of this package. Move them or choose another folder."
        )
    return atomic.whole_folder(folder, CONFIG, WRITTEN)


def _is_ours(config: Path) -> bool:
    try:
        found = read_json(config)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == HEADER["format"]


def write_config(folder: str | Path, config: dict) -> Path:
    """Write `config.json` for `read_folder`.

    Args:
        folder: Made where it does not exist.
        config: `name`; `backbone`, as in a preset, and its `dtype`;
            `preprocessor`, with options of its own, or `None`.
    """
    config = HEADER | config | HEADER
    path = Path(folder) / CONFIG
    _check(config, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def read_folder(folder: Path, load_weights: bool = True) -> dict:
    """Read the config of a folder that `save_to_preset` wrote.

    Args:
        folder: Path.
        load_weights: Whether weights and tokenizer must be there.

    Returns:
        The config, with `name`, `backbone` and `preprocessor`.

    Raises:
        ValueError: missing file, bad config.
    """
    needed = [CONFIG, WEIGHTS, TOKENIZER] if load_weights else [CONFIG]
    config = {}
    if (folder / CONFIG).is_file():
        # Checked first: a folder of another format lacks the rest as well.
        config = read_json(folder / CONFIG)
        _check(config, folder / CONFIG)
    if config.get("preprocessor", True) is None:
        needed = [file for file in needed if file != TOKENIZER]
    if (folder / f"{WEIGHTS}.index.json").is_file():
        needed = [file for file in needed if file != WEIGHTS]
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected: a folder that "
            "`save_to_preset` wrote. Save again, or copy all of it."
        )
    return config


def read_json(path: Path) -> dict:
    """Read a JSON file; a `ValueError` names one that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def _check(config: dict, path: Path) -> None:
    given = config if isinstance(config, dict) else {}
    problems = [
        f"expected {key}={value!r}, received {given.get(key)!r}"
        for key, value in HEADER.items()
        if given.get(key) != value
    ]
    if not problems:
        # A published preset has every field; a preprocessor may have more,
        # and a backbone says its adapters and its bits.
        fields = describe("pali_gemma2_pt_3b_224")
        preprocessor = given.get("preprocessor")
        if preprocessor is not None:
            own = preprocessor if isinstance(preprocessor, dict) else {}
            preprocessor = own | fields["preprocessor"]
        backbone = fields["backbone"] | {"dtype": ""}
        if isinstance(given.get("backbone"), dict):
            for key in ("lora", "quantization"):
                backbone[key] = given["backbone"].setdefault(key, None)
        parts = {"backbone": backbone, "preprocessor": preprocessor}
        problems = _differences(given, HEADER | {"name": ""} | parts)
    if problems:
        raise ValueError(
            f"{path} is no config of this package: {'; '.join(problems)}. A "
            "newer format_version needs a newer keras_paligemma."
        )


def _differences(found: dict, expected: dict, prefix: str = "") -> list[str]:
    found = found if isinstance(found, dict) else {}
    problems = [f"{prefix}{key} is missing" for key in expected.keys() - found]
    problems += [f"{prefix}{key} is unknown" for key in found.keys() - expected]
    for key in found.keys() & expected:
        if isinstance(expected[key], dict):
            inner = f"{prefix}{key}."
            problems += _differences(found[key], expected[key], inner)
    return sorted(problems)


@functools.cache
def _handles() -> dict[str, str]:
    """Maps the handles of the published models to their presets."""
    return {
        handle: path.stem
        for path in _HERE.glob("*.json")
        for handle in read_json(path).get("handles", {}).values()
    }


def _unknown(source: str | Path) -> str:
    near = difflib.get_close_matches(str(source), names(), cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"There is no preset and no folder {str(source)!r}.{meant} Expected: "
        "one of `presets.names()`, a handle ('hf://…', 'kaggle://…'), or a "
        "folder written by `save_to_preset`; a relative path starts at "
        f"{str(Path.cwd())!r}."
    )
