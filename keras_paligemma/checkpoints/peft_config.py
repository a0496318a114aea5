"""PEFT's `adapter_config.json`: its fields, their values and meanings."""

import json
import re

from keras_paligemma.checked import is_number
from keras_paligemma.config import read_json

# Initialisations that leave the base unchanged: "eva" sets ranks, which are in
# the file; the others only set the values that training began with.
PLAIN_INITIALISATIONS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)
# Initialisations that change the base; PEFT can convert them to an adapter of
# the unchanged base.
CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")

# Fields that change no value of a loaded adapter: its origin; its modules,
# which its tensors show too; its initialisation; how other code runs or shards
# it.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
# Fields of features that are not implemented: an error unless they are off. So
# is a field that is in none of these lists, such as a field of a newer PEFT.
UNSUPPORTED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
)


def _is_flag(value):
    return isinstance(value, bool)


def _is_rank(value):
    return type(value) is int and 1 <= value <= 65_536


def _is_alpha(value):
    # A scale of 0 would remove the adapter; JSON's integers are unbounded.
    return is_number(value) and 0 < abs(value) < 1e30


def _is_share(value):
    return is_number(value) and 0 <= value < 1


def _is_pattern_of(fits):
    def is_pattern(value):
        return isinstance(value, dict) and all(
            _is_expression(key) and fits(item) for key, item in value.items()
        )

    return is_pattern


def _is_expression(value):
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _are_names(value):
    listed = isinstance(value, list)
    return listed and all(isinstance(name, str) and name for name in value)


# Other fields may be missing or `None`, which means PEFT's default.
_REQUIRED = ("r", "lora_alpha")
# Fields that are read: the expected value, and a function that checks it.
READ = {
    "r": ("an integer of 1 to 65536", _is_rank),
    "lora_alpha": ("a number other than 0", _is_alpha),
    "lora_dropout": ("a number of at least 0 and below 1", _is_share),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "lora_bias": ("true or false", _is_flag),
    "ensure_weight_tying": ("true or false", _is_flag),
    "bias": (
        "'none', 'all' or 'lora_only'",
        lambda value: value in ("none", "all", "lora_only"),
    ),
    "rank_pattern": (
        "an object of expressions and integers of 1 to 65536",
        _is_pattern_of(_is_rank),
    ),
    "alpha_pattern": (
        "an object of expressions and numbers other than 0",
        _is_pattern_of(_is_alpha),
    ),
    "modules_to_save": ("a list of names", _are_names),
    "init_lora_weights": (
        "true, false or a name",
        lambda value: isinstance(value, (bool, str)),
    ),
}


def read(path):
    """Read the configuration of an adapter and check all of its fields.

    Args:
        path: `pathlib.Path` of `adapter_config.json`.

    Returns:
        dict, the content of the file.

    Raises:
        ValueError: not a low-rank adapter, a value of a wrong type, an
            initialisation that changed the base, or a feature that is not
            implemented.
    """
    config = read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(
            f"{path} describes no low-rank adapter. Expected: peft_type "
            f"'LORA', r and lora_alpha. Received: peft_type {kind!r}."
        )
    given = dict.fromkeys(_REQUIRED) | {
        key: value for key, value in config.items() if value is not None
    }
    problems = [
        f"{key} is {given[key]!r}, expected {expected}"
        for key, (expected, fits) in READ.items()
        if key in given and not fits(given[key])
    ]
    if problems:
        raise ValueError(
            f"{path} is damaged or written by hand: {'; '.join(problems)}. "
            "Expected: what PEFT's `save_pretrained` writes."
        )
    _check_initialisation(config.get("init_lora_weights"), path)
    known = {"peft_type", *READ, *HARMLESS}
    strange = {
        key: value
        for key, value in config.items()
        if value and key not in known
    }
    if strange:
        newer = sorted(strange.keys() - UNSUPPORTED)
        why = f"; {newer} may be of a newer PEFT" if newer else ""
        raise ValueError(
            f"{path} describes an adapter of a kind that has no place here"
            f"{why}. Received: {strange}. Expected: none of these. Merge it "
            "with PEFT's `merge_and_unload` and load the merged model."
        )
    return config


def _check_initialisation(name, path):
    """Raise if the adapter's initialisation changed the weights of the base."""
    name = name.lower() if isinstance(name, str) else name
    if name in PLAIN_INITIALISATIONS:
        return
    convert = ""
    if name.startswith(CONVERTIBLE):
        convert = (
            "Convert it where it was trained: PEFT's `save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=initial)`, `initial` "
            "being the folder of the adapter before its training. Or merge it: "
        )
    raise ValueError(
        f"{path} belongs to a base whose kernels its initialisation changed: "
        "on the published base it computes something else. Received: "
        f"init_lora_weights={name!r}. Expected one of "
        f"{PLAIN_INITIALISATIONS}. {convert or 'Merge it: '}"
        "`merge_and_unload` on that base, and load the merged model."
    )


def rank_and_alpha(config, module):
    """Return a module's rank and alpha, by the first pattern that matches.

    Args:
        config: dict, from `read`.
        module: str, its name in transformers' model.

    Source: PEFT, `utils/other.py`, `get_pattern_key`.
    """

    def find(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    return (
        find(config.get("rank_pattern"), config["r"]),
        find(config.get("alpha_pattern"), config["lora_alpha"]),
    )


def names_layers(config):
    """Return whether the configuration limits the adapter to some layers."""
    modules = [config.get(key) for key in ("target_modules", "exclude_modules")]
    # Digits are layer numbers, except in the names `fc1` and `fc2`.
    named = re.search(r"\d", re.sub(r"fc[12]", "", json.dumps(modules)))
    patterns = config.get("layers_to_transform") is not None
    return patterns or named is not None


def saves(config, module):
    """Return whether PEFT saves a copy of a module with the adapter."""
    return any(
        module.endswith(name) for name in config.get("modules_to_save") or ()
    )
