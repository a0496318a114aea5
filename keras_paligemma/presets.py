"""Presets: a name, a folder or a hub's handle to a config and its files.

A preset is data: `presets/<name>.json` describes a published model, a folder
holds one in this package's own format. No model class is known here.
"""

import difflib
import json
import os
from pathlib import Path

HEADER = {"format": "keras_paligemma", "format_version": 1}
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"

# A wheel carries the presets inside the package, a checkout beside it.
_WHEEL = Path(__file__).parent / "preset_files"
_HERE = _WHEEL if _WHEEL.is_dir() else Path(__file__).parents[1] / "presets"


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
    return _read_json(path if path.is_file() else _HERE / name / CONFIG)


def resolve(
    source: str | Path, load_weights: bool = True
) -> tuple[dict, Path | None]:
    """Find the config and the files of a model.

    Args:
        source: Preset name, folder written by `save_to_preset`, or handle of
            such a folder on a hub, `hf://…` or `kaggle://…`.
        load_weights: Whether weights must be there.

    Returns:
        The config, with `backbone` and `preprocessor`, and the folder of its
        files, `None` for a published model without weights.

    Raises:
        ValueError: unknown source, no weights, missing file, bad config.
    """
    if isinstance(source, str) and "://" in source:
        # A published handle means its preset: nothing here reads its files.
        source = _published().get(source) or download(source)
    named = source in names()
    folder = _HERE / source if named else Path(source).expanduser()
    if named and not folder.is_dir():
        config = describe(source)
        if load_weights:
            pages = "\n".join(map(_page, config["handles"].values()))
            raise ValueError(
                f"The weights of {source!r} do not come with this package. "
                f"They are published under the {config['license']}, at\n"
                f"{pages}\nReading these formats is on the roadmap. To build "
                "the model without its weights, pass `load_weights=False`."
            )
        return config, None
    if not folder.is_dir():
        raise ValueError(_unknown(source))
    return _read_folder(folder, load_weights), folder


def download(handle: str) -> Path:
    """Fetch a folder of this package's format into its hub's own cache.

    Args:
        handle: `hf://owner/model` or `kaggle://owner/model/keras/variation`.

    Raises:
        ImportError, OSError: no client of the hub; it did not give the files.
    """
    hub, _, path = handle.partition("://")
    try:
        if hub == "hf":
            from huggingface_hub import snapshot_download

            files = [CONFIG, WEIGHTS, TOKENIZER]
            return Path(snapshot_download(path, allow_patterns=files))
        if hub == "kaggle":
            from kagglehub import model_download

            return Path(model_download(path))
    except ImportError as error:
        client = "keras_paligemma[hf]" if hub == "hf" else "kagglehub"
        raise ImportError(f"{handle} needs: pip install '{client}'") from error
    except Exception as error:  # Every client refuses with its own classes.
        raise OSError(
            f"{_page(handle)}\ncould not be downloaded: {error}\nCheck the "
            "name, the connection, and that you accepted the licence on that "
            "page with the account that the hub's client is logged in with."
        ) from error
    raise ValueError(
        "A handle starts with its hub. Expected: 'hf://owner/model' or "
        f"'kaggle://owner/model/keras/variation'. Received: {handle!r}."
    )


def write_config(folder: str | Path, config: dict) -> Path:
    """Write `config.json`: the whole file or none, should the process die.

    Args:
        folder: Made where it does not exist.
        config: `name`; `backbone`, as in a preset, and its `dtype`;
            `preprocessor`, with options of its own, or `None`.
    """
    config = HEADER | config | HEADER
    path = Path(folder) / CONFIG
    _check(config, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{CONFIG}.{os.getpid()}")
    draft.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def _read_folder(folder: Path, load_weights: bool) -> dict:
    needed = [CONFIG, WEIGHTS, TOKENIZER] if load_weights else [CONFIG]
    config = {}
    if (folder / CONFIG).is_file():
        # Checked first: a folder of another format lacks the rest as well.
        config = _read_json(folder / CONFIG)
        _check(config, folder / CONFIG)
    if config.get("preprocessor", True) is None:
        needed = [file for file in needed if file != TOKENIZER]
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected: a folder that "
            "`save_to_preset` wrote. Save again, or copy all of it."
        )
    return config


def _read_json(path: Path) -> dict:
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
        # and a backbone with adapters says which.
        fields = describe("pali_gemma2_pt_3b_224")
        preprocessor = given.get("preprocessor")
        if preprocessor is not None:
            own = preprocessor if isinstance(preprocessor, dict) else {}
            preprocessor = own | fields["preprocessor"]
        backbone = fields["backbone"] | {"dtype": ""}
        if isinstance(given.get("backbone"), dict):
            backbone |= {"lora": given["backbone"].setdefault("lora", None)}
        parts = {"backbone": backbone, "preprocessor": preprocessor}
        problems = _differences(given, HEADER | {"name": ""} | parts)
    if problems:
        raise ValueError(
            f"{path} is no config of this package: {'; '.join(problems)}. A "
            "newer format_version needs a newer keras_paligemma; reading "
            "other formats than 'keras_paligemma' is on the roadmap."
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


def _published() -> dict[str, str]:
    """Maps the handles of the published models to their presets."""
    return {
        handle: path.stem
        for path in _HERE.glob("*.json")
        for handle in _read_json(path).get("handles", {}).values()
    }


def _page(handle: str) -> str:
    """Says where to accept the licence of a handle's model."""
    hub, _, path = handle.partition("://")
    site = "https://huggingface.co/"
    if hub == "kaggle":
        site = "https://www.kaggle.com/models/"
        path = "/".join(path.split("/")[:2])
    return f"- {handle} (licence: {site}{path})"


def _unknown(source: str | Path) -> str:
    near = difflib.get_close_matches(str(source), names(), cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return (
        f"There is no preset and no folder {str(source)!r}.{meant} Expected: "
        "one of `presets.names()`, a handle ('hf://…', 'kaggle://…'), or a "
        "folder written by `save_to_preset`; a relative path starts at "
        f"{str(Path.cwd())!r}."
    )
