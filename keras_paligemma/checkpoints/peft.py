"""Low-rank adapters as Hugging Face's PEFT stores them."""

import functools
import json
import re

import numpy as np
from safetensors.numpy import save_file

from keras_paligemma import atomic
from keras_paligemma import presets
from keras_paligemma.checkpoints import safetensors_files
from keras_paligemma.checkpoints.engine import LAYER
from keras_paligemma.checkpoints.engine import Row

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Ours -> theirs: the module, the axes of A and those of B. A is shared by all
# heads in both.
INTO_HEADS = ("r d -> d r", "(n h) r -> r n h")
FROM_HEADS = ("r (n h) -> n h r", "d r -> r d")
PLAIN = ("r d -> d r", "f r -> r f")
DECODER = {
    "query": ("attention/query", "self_attn.q_proj", *INTO_HEADS),
    "key": ("attention/key", "self_attn.k_proj", *INTO_HEADS),
    "value": ("attention/value", "self_attn.v_proj", *INTO_HEADS),
    "output": ("attention/output", "self_attn.o_proj", *FROM_HEADS),
    "gate": ("mlp/gate", "mlp.gate_proj", *PLAIN),
    "up": ("mlp/up", "mlp.up_proj", *PLAIN),
    "down": ("mlp/down", "mlp.down_proj", *PLAIN),
}
VISION = {
    "vision.query": ("attention/query", "self_attn.q_proj", *INTO_HEADS),
    "vision.key": ("attention/key", "self_attn.k_proj", *INTO_HEADS),
    "vision.value": ("attention/value", "self_attn.v_proj", *INTO_HEADS),
    "vision.output": ("attention/output", "self_attn.out_proj", *FROM_HEADS),
    "vision.up": ("mlp/up", "mlp.fc1", *PLAIN),
    "vision.down": ("mlp/down", "mlp.fc2", *PLAIN),
}

# Where transformers keeps the layers: since 5, 4.52 and before.
PLACES = (
    (
        "model.language_model.layers.",
        "model.vision_tower.encoder.layers.",
    ),
    (
        "model.language_model.layers.",
        "model.vision_tower.vision_model.encoder.layers.",
    ),
    (
        "language_model.model.layers.",
        "vision_tower.vision_model.encoder.layers.",
    ),
)
ROOT = "base_model.model."

# What an adapter may say that this package's adapters do not do.
PLAIN_VALUES = {
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
}


def rows(targets, place=PLACES[0]):
    """List the rows of an adapter.

    Args:
        targets: names of projections, keys of `DECODER` and `VISION`.
        place: pair of str, where transformers keeps the layers of the decoder
            and of the vision tower.

    Returns:
        List of `Row`.

    Source: PEFT, `tuners/lora/layer.py`.
    """
    table = []
    for target in targets:
        known, tower, start = DECODER, "text_decoder", place[0]
        if target in VISION:
            known, tower, start = VISION, "vision_encoder", place[1]
        ours, theirs, axes_a, axes_b = known[target]
        for ours_part, part, axes in (
            ("adapter_a", "lora_A", axes_a),
            ("adapter_b", "lora_B", axes_b),
        ):
            table.append(
                Row(
                    f"{tower}/blocks/{ours}/{ours_part}",
                    f"{ROOT}{start}{LAYER}.{theirs}.{part}.weight",
                    axes,
                )
            )
    return table


def read(folder):
    """Read what an adapter is, and open nothing of its values.

    Args:
        folder: path.

    Returns:
        Dict of the arguments of `enable_lora`;
        the list of rows; and a function that gives a context manager of the
        tensors.

    Raises:
        ValueError: no adapter, a damaged one, or one of a kind that this
            package has not.
    """
    folder = atomic.current(folder, CONFIG)
    missing = [one for one in (CONFIG, WEIGHTS) if not (folder / one).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected: a folder that "
            "PEFT's `save_pretrained` or `save_adapter` wrote."
        )
    config = presets.read_json(folder / CONFIG)
    _check(config, folder / CONFIG)
    open_files = functools.partial(
        safetensors_files.open_safetensors, [folder / WEIGHTS]
    )
    with open_files() as tensors:
        place, targets = _recognise(tensors.shapes, folder / WEIGHTS)
    lora = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "targets": targets,
        "dropout": config.get("lora_dropout") or 0.0,
        "rslora": bool(config.get("use_rslora")),
    }
    return lora, rows(targets, place), open_files


def _check(config, path):
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA" or not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(
            f"{path} describes no low-rank adapter. Expected: peft_type "
            f"'LORA', r and lora_alpha. Received: peft_type {kind!r}."
        )
    strange = {
        key: config[key]
        for key, plain in PLAIN_VALUES.items()
        if (config.get(key) or plain) != plain
    }
    if strange:
        raise ValueError(
            f"{path} describes an adapter of a kind that has no place here. "
            f"Received: {strange}. Expected: none of these. Merge it with "
            "PEFT's `merge_and_unload` and load the merged model."
        )


def _recognise(shapes, path):
    """Find the place of the layers, and the adapted projections."""
    decoder = {one[1]: name for name, one in DECODER.items()}
    vision = {one[1]: name for name, one in VISION.items()}
    matched, unknown = {}, []
    for key in shapes:
        for place in PLACES:
            for start, known in zip(place, (decoder, vision), strict=True):
                found = re.fullmatch(
                    re.escape(ROOT + start) + r"\d+\.(.+)\.lora_[AB]\.weight",
                    key,
                )
                if found and found[1] in known:
                    matched.setdefault(place, {})[key] = known[found[1]]
        if not any(key in keys for keys in matched.values()):
            unknown.append(key)
    if unknown or not matched:
        raise ValueError(
            f"{path} adapts what has no adapter here. Received: {unknown[:4]}, "
            f"{len(unknown)} keys. Expected: projections of the blocks of "
            "PaliGemma's decoder and vision tower."
        )
    place = max(matched, key=lambda one: len(matched[one]))
    found = set(matched[place].values())
    return place, [one for one in (*DECODER, *VISION) if one in found]


def write(folder, lora, arrays, base=None):
    """Write an adapter that PEFT loads onto transformers' PaliGemma.

    One that is there is replaced, all at once; see `atomic.whole_folder`.

    Args:
        folder: path.
        lora: dict of the arguments of `enable_lora`.
        arrays: iterable of pairs of key and array.
        base: str or `None`, name of the model that it belongs to.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": _pattern(lora["targets"]),
        "inference_mode": True,
        "use_rslora": lora["rslora"],
        **PLAIN_VALUES,
    }
    # safetensors writes the memory of an array, whatever its strides.
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays}
    text = json.dumps(config, indent=2) + "\n"
    with atomic.whole_folder(folder, CONFIG, [WEIGHTS]) as draft:
        save_file(arrays, draft / WEIGHTS)
        # safetensors lets nobody else read what it writes.
        (draft / WEIGHTS).chmod(0o644)
        (draft / CONFIG).write_text(text, encoding="utf-8")


def _pattern(targets):
    """Name the modules by one pattern: those of the towers are alike."""
    parts = []
    for known, tower in ((DECODER, "language_model"), (VISION, "vision_tower")):
        modules = [known[one][1] for one in targets if one in known]
        if modules:
            joined = "|".join(one.replace(".", r"\.") for one in modules)
            parts.append(rf".*{tower}.*\.({joined})")
    return "|".join(parts)
