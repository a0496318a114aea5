"""Settings of a fine-tune: their types, and reading them from TOML."""

import dataclasses
import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from keras_paligemma.checked import Checked
from keras_paligemma.checked import choice
from keras_paligemma.checked import flag
from keras_paligemma.checked import number
from keras_paligemma.checked import text
from keras_paligemma.checked import texts
from keras_paligemma.checked import whole
from keras_paligemma.config import QUANTIZATIONS

MOST = 2**31 - 1
BELOW_ONE = 0.999_999


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    """All settings of a fine-tune.

    A TOML file has the same names; on the command line, "_" becomes "-".

    Args:
        preset: str, as `from_preset` takes it.
        data: str, path of a JSONL file with image, prefix and suffix in each
            line; or of another data set that `data.open_source` can read.
        output: str, folder of the run: checkpoints, log, and the result.
        image_folder: str, folder of the pictures; the file's folder if none.
        validation: str, path of a validation set; or the same folder as data,
            whose split "val" is used.
        task: str, what to learn of a data set of objects: detect or segment.
        codec: str, path or handle of vae-oid.npz, the mask codec of models of
            published sizes, which need it for masks; others take that of the
            nano preset if none.
        allow_empty: bool, accept empty responses, such as those of pictures
            without objects.
        epochs: int, number of passes over the data.
        batch_size: int, examples per step.
        learning_rate: float, learning rate after the warm-up.
        weight_decay: float, see `transfer_recipe`.
        warmup: float, fraction of the steps.
        label_smoothing: float, probability that targets give to other tokens.
        gradient_accumulation: int, batches per update.
        lora_rank: int, rank of adapters; 0 trains the weights themselves.
        lora_alpha: float, adapters are scaled by alpha / rank; rank if none.
        lora_targets: strs, layers with adapters: decoder.attention, decoder,
            vision, all, …; see `enable_lora`.
        lora_dropout: float, dropout rate of an adapter's inputs.
        dropout: float, dropout rate of the outputs of attention and MLP in
            each decoder block.
        freeze: strs, patterns of weights that are not trained when
            lora_rank is 0, such as "vision_encoder/*".
        quantize: str, storage of frozen weights: int8 or int4.
        dtype: str, dtype policy; the preset's if none.
        remat: str, what the backward pass recomputes: block, dots, pair or
            none.
        image_size: int, pixels; the preset's if none.
        prompt_length: int, tokens; the preset's if none.
        response_length: int, tokens; the preset's if none.
        skip_errors: bool, skip and count examples that cannot be used.
        workers: int, processes that read data.
        save_every: int, steps between checkpoints.
        seed: int, seed of data order, dropout and new weights.

    Raises:
        ValueError: a value of a wrong type or out of its range.
    """

    preset: str = text()
    data: str = text()
    output: str = text()
    image_folder: str | None = text(None, optional=True)
    validation: str | None = text(None, optional=True)
    task: str = choice(("detect", "segment"), "detect")
    codec: str | None = text(None, optional=True)
    allow_empty: bool = flag(False)
    epochs: int = whole(MOST, 1)
    batch_size: int = whole(MOST, 8)
    learning_rate: float = number(1e-12, 1e6, 1e-4)
    weight_decay: float = number(0, 1e6, 0.0)
    warmup: float = number(0, BELOW_ONE, 0.05)
    label_smoothing: float = number(0, BELOW_ONE, 0.0)
    gradient_accumulation: int = whole(MOST, 1)
    lora_rank: int = whole(65_536, 8, least=0)
    lora_alpha: float | None = number(1e-12, 1e6, None, optional=True)
    lora_targets: tuple[str, ...] = texts(("decoder.attention",))
    lora_dropout: float = number(0, BELOW_ONE, 0.0)
    dropout: float = number(0, BELOW_ONE, 0.0)
    freeze: tuple[str, ...] = texts(())
    quantize: str | None = choice(QUANTIZATIONS, None, optional=True)
    dtype: str | None = text(None, optional=True)
    remat: str | None = text("block", optional=True)
    image_size: int | None = whole(16_384, None, optional=True)
    prompt_length: int | None = whole(MOST, None, optional=True)
    response_length: int | None = whole(MOST, None, optional=True)
    skip_errors: bool = flag(False)
    workers: int = whole(MOST, 0, least=0)
    save_every: int = whole(MOST, 1000)
    seed: int = whole(2**32 - 1, 0, least=0)


# Fields that may be a string, or in a file a list of strings.
TEXTS = ("lora_targets", "freeze")


def read_file(path):
    """Read a TOML file as a dict.

    Args:
        path: str or path; `None` for an empty dict.

    Returns:
        dict.

    Raises:
        ValueError: it is not a TOML file.
    """
    if path is None:
        return {}
    try:
        # Some editors on Windows write a byte order mark.
        return tomllib.loads(
            Path(os.path.expanduser(path)).read_text("utf-8-sig")
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8, as TOML must be. Received: {error}. "
            "Save it as UTF-8."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML file: {error}.") from error


def read_settings(path=None, defaults=None, **given):
    """Read settings from a TOML file, which keyword arguments override.

    Args:
        path: str or path, or `None`.
        defaults: dict of fields that both override, or `None`.
        **given: fields of `Settings`; `None` means not given.

    Returns:
        `Settings`.

    Raises:
        ValueError: an unknown name, a missing required field, or an invalid
            value.
    """
    values: dict[str, Any] = (defaults or {}) | read_file(path)
    values |= {key: value for key, value in given.items() if value is not None}
    # TOML has no null, so "none" stands for it.
    values = {k: None if v == "none" else v for k, v in values.items()}
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for key in values.keys() - fields.keys():
        near = difflib.get_close_matches(key, fields, 1)
        raise ValueError(
            f"Unknown setting. Received: {key!r}. Expected one of "
            f"{list(fields)}. {f'Did you mean {near[0]!r}?' if near else ''}"
        )
    lacking = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and not values.get(name)
    ]
    if lacking:
        raise ValueError(
            f"A fine-tune needs more. Missing: {', '.join(lacking)}."
        )
    for name, value in values.items():
        if name in TEXTS and isinstance(value, (str, list)):
            values[name] = (value,) if isinstance(value, str) else tuple(value)
    return Settings(**values)
