"""Presets of a tokenizer, image converter or preprocessor without a model.

Each has KerasHub's files: `tokenizer.json` and its vocabulary below `assets`,
`image_converter.json`, `preprocessor.json`. A preset of a whole model has one
`config.json` for all of them.
"""

import os
from pathlib import Path

import keras

from keras_paligemma import atomic
from keras_paligemma import presets

FILES = ("tokenizer.json", "image_converter.json", "preprocessor.json")


def read(cls, preset, file: str) -> dict | None:
    """Read the configuration of a part from its own folder.

    Args:
        cls: class of the part.
        preset: argument of `from_preset`.
        file: str, name of the part's file.

    Returns:
        dict for `cls.from_config`; `None` if `preset` is not a folder with
        such a file of this class, or is a model's preset with a preprocessor.

    Raises:
        ValueError: the file is not JSON.
    """
    folder = Path(os.path.expanduser(preset))
    if not (folder / file).is_file() or has_preprocessor(folder):
        return None
    saved = presets.read_json(folder / file)
    name = keras.saving.get_registered_name(cls)
    if not isinstance(saved, dict) or saved.get("registered_name") != name:
        return None
    return saved["config"]


def has_preprocessor(folder) -> bool:
    """Return whether a folder holds a model's preset with a preprocessor."""
    config = atomic.current(Path(folder), presets.CONFIG) / presets.CONFIG
    if not config.is_file():
        return False
    found = presets.read_json(config)
    return isinstance(found, dict) and bool(found.get("preprocessor"))


def folder_for(preset_dir) -> str:
    """Return the folder to save a part to, unless it has files of others.

    A model's preset with a preprocessor already has the part's configuration.
    A backbone's preset does not have it, so a preprocessor may be saved beside
    it, before or after.

    Args:
        preset_dir: path of the folder, which need not exist.

    Returns:
        str, the path with `~` expanded, as KerasHub takes it.

    Raises:
        ValueError: the folder holds a model of another format, a preset with
            a preprocessor, or a foreign file with a part's name.
    """
    folder = atomic.local(preset_dir)
    config = atomic.current(folder, presets.CONFIG) / presets.CONFIG
    if has_preprocessor(folder):
        raise ValueError(
            f"{folder} holds a preset with a preprocessor of its own. "
            "Expected: another folder, or the preset of a backbone alone. "
            "`model.save_to_preset` replaces all of it."
        )
    others = [folder / name for name in FILES if (folder / name).is_file()]
    others = [path for path in others if not _is_ours(path)]
    if config.is_file() and not _is_ours(config):
        others.append(config)
    if others:
        names = ", ".join(sorted(path.name for path in others))
        raise ValueError(
            f"{folder} holds {names} of another library, which would be "
            "replaced or contradicted. Expected: another folder."
        )
    return str(folder)


def _is_ours(path):
    saved = presets.read_json(path)
    if not isinstance(saved, dict):
        return False
    name = str(saved.get("registered_name"))
    return name.startswith("keras_paligemma>") or (
        saved.get("format") == presets.HEADER["format"]
    )
