"""Tokenizer, converter and preprocessor in a folder by themselves.

Each writes the files that KerasHub has for it: `tokenizer.json` and its
vocabulary below `assets`, `image_converter.json`, `preprocessor.json`. A
preset of a whole model has all of that in its `config.json`.
"""

from pathlib import Path

import keras

from keras_paligemma import atomic
from keras_paligemma import presets


def read(cls, preset, file: str) -> dict | None:
    """Reads the configuration that a part wrote into a folder.

    Args:
        cls: Class of the part.
        preset: Whatever `from_preset` takes.
        file: String, name of the part's file.

    Returns:
        The configuration for `cls.from_config`; `None` where `preset` is no
        folder with such a file of this class, or has a whole preprocessor.

    Raises:
        ValueError: the file is no JSON.
    """
    folder = Path(preset).expanduser()
    if not (folder / file).is_file() or has_preprocessor(folder):
        return None
    saved = presets.read_json(folder / file)
    name = keras.saving.get_registered_name(cls)
    if not isinstance(saved, dict) or saved.get("registered_name") != name:
        return None
    return saved["config"]


def has_preprocessor(folder) -> bool:
    """Tells whether a folder holds a preset with a preprocessor of its own."""
    config = atomic.current(Path(folder), presets.CONFIG) / presets.CONFIG
    if not config.is_file():
        return False
    found = presets.read_json(config)
    return isinstance(found, dict) and bool(found.get("preprocessor"))


def refuse_whole_preset(folder):
    """Raises where a part's files would lie beside a preset that has one.

    Two answers to one question would be in the folder. A backbone's preset
    has none, so its preprocessor may be saved beside it, before or after.
    """
    if has_preprocessor(folder):
        raise ValueError(
            f"{folder} holds a preset with a preprocessor of its own. "
            "Expected: another folder, or the preset of a backbone alone. "
            "`model.save_to_preset` replaces all of it."
        )
