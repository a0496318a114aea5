"""Low-rank adapters as Hugging Face's PEFT stores them."""

import dataclasses
import functools
import os
import re

import numpy as np

from keras_paligemma import atomic
from keras_paligemma.checkpoints import peft_config
from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.checkpoints.engine import LAYER
from keras_paligemma.checkpoints.engine import Row
from keras_paligemma.checkpoints.finite import Finite
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.lora_config import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."

_TARGET_OF = {place: target for target, place in TARGETS.items()}
TABLE = "text_decoder/token_embedding/table"
# The head's own table, if an adapter has one that differs from the embedding.
HEAD = "text_decoder/token_embedding/adapter_head"
# A module's pieces beside its kernel: PEFT's name to ours.
PIECES = {
    "lora_A.weight": "adapter_a",
    "lora_B.weight": "adapter_b",
    "lora_B.bias": "adapter_bias",
    "lora_magnitude_vector": "adapter_magnitude",
}
# Names of parts in transformers 5; the rows have the older names.
_NEWEST = {
    hugging_face.VISION[0]: "model.vision_tower.",
    hugging_face.PROJECTOR[0]: "model.multi_modal_projector.linear.",
    hugging_face.TEXT[0]: "model.language_model.",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of an adapter, and the weight it belongs to.

    Args:
        key: str, key in the file.
        module: str, name of its module in transformers' model.
        row: `Row` of a piece, or of a weight that is replaced as a whole.
        layer: int, index of the block; 0 outside of the blocks.
        target: str, or `None` for a whole weight.
    """

    key: str
    module: str
    row: Row
    layer: int
    target: str | None


def rows(architecture):
    """List the rows of all pieces of adapters, and of whole weights.

    Args:
        architecture: see `hugging_face.rows`.

    Returns:
        dict of name to `Row`, whose key is the oldest published name, without
        `ROOT`. In both formats all heads share one A.

    Source: PEFT, `tuners/lora/layer.py` and `tuners/lora/dora.py`.
    """
    base = hugging_face.rows(architecture)
    table = {row.name: row for row in base}
    head = hugging_face.HEADS[0]
    table[HEAD] = dataclasses.replace(table[TABLE], name=HEAD, key=head)
    for place in TARGETS.values():
        kernel = table[f"{place}/kernel"]
        outputs, inputs = re.findall(
            r"\([^)]*\)|\S+", kernel.axes.split("->")[0]
        )
        each_output = f"{outputs} -> {outputs.strip('()')}"
        axes = {
            "adapter_a": f"r {inputs} -> {inputs.strip('()')} r",
            "adapter_b": f"{outputs} r -> r {outputs.strip('()')}",
            "adapter_bias": each_output,
            "adapter_magnitude": each_output,
        }
        for suffix, piece in PIECES.items():
            key = kernel.key.removesuffix("weight") + suffix
            table[f"{place}/{piece}"] = Row(
                f"{place}/{piece}", key, axes[piece]
            )
    return table


def find(folder):
    """Find an adapter and read its configuration, but no values.

    Args:
        folder: path.

    Returns:
        The dict of `peft_config.read`, and a function that returns a
        context manager of the tensors.

    Raises:
        ValueError: no adapter, or one of an unsupported kind.
    """
    folder = atomic.current(os.path.expanduser(folder), CONFIG)
    names = (CONFIG, WEIGHTS)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}. Expected: a folder that "
            "PEFT's `save_pretrained` or `save_adapter` wrote."
        )
    config = peft_config.read(folder / CONFIG)
    return config, functools.partial(
        safetensors.open_safetensors, [folder / WEIGHTS]
    )


def read(folder, architecture, weights, allow_nonfinite=False):
    """Read an adapter for a model with these weights.

    Args:
        folder: path.
        architecture: see `hugging_face.rows`.
        weights: dict of name to `Weight`, quantised ones as float views.
        allow_nonfinite: bool, accept NaN and infinite values.

    Returns:
        `LoraConfig`; dict of name to float32 array, the pieces, padded with
        zeros to the largest rank and to all layers; and dict of name to
        array, the weights that the adapter replaces as a whole.

    Raises:
        ValueError: as in `find`, or the adapter does not fit the model; all
            differences are listed.
    """
    config, open_files = find(folder)
    table = {row.key: row for row in rows(architecture).values()}
    pieces, whole = {}, {}
    with open_files() as tensors:
        if not allow_nonfinite:
            tensors = Finite(tensors, folder)
        entries = _entries(tensors.shapes, table, weights, folder)
        lora = _lora(config, entries, weights)
        _check_fits(config, lora, entries, weights, tensors.shapes)
        for entry in entries:
            name, layer = entry.row.name, entry.layer
            shape = _shape(entry, lora, weights)
            array = entry.row.read(tensors.read(entry.key), shape)
            if entry.target is not None:
                layers, _ = _sizes(name, weights)
                shape = _shape(entry, lora, weights, lora.rank)
                if name not in pieces:
                    pieces[name] = np.zeros((layers, *shape), "float32")
                pieces[name][(layer, *map(slice, array.shape))] = array
            elif BLOCKS in name:
                if name not in whole:
                    # Layers that are not in the file keep their values.
                    whole[name] = weights[name].read().copy()
                whole[name][layer] = array
            else:
                whole[name] = array
    _tie(config, whole, weights)
    for name, layers in pieces.items():
        pieces[name] = layers if BLOCKS in name else layers[0]
    return lora, pieces, whole


def _entries(shapes, table, weights, folder):
    """Return the `Entry` of each key; raise on unknown keys."""
    entries, unknown, seen = [], [], {}
    for key, shape in shapes.items():
        # A module with an adapter also stores the base's weights.
        module = key.removeprefix(ROOT).replace(".base_layer.", ".")
        name = _oldest(module)
        number = re.search(r"\.layers\.(\d+)\.", name)
        layer = int(number[1]) if number else 0
        row = table.get(re.sub(r"\.layers\.\d+\.", f".layers.{LAYER}.", name))
        if row is None:
            unknown.append(key)
            continue
        if row.extra:
            count = shape[0] - weights[TABLE].shape[0]
            fits = 0 <= count <= hugging_face.EXTRA_ROWS
            row = dataclasses.replace(row, extra=count if fits else 0)
        other = seen.setdefault((row.name, layer), key)
        if other != key:
            raise ValueError(
                f"{other} and {key} of {folder} are one tensor. Expected: each "
                "once. Save the adapter again."
            )
        place, last = row.name.rsplit("/", 1)
        target = _TARGET_OF[place] if last in PIECES.values() else None
        module = re.sub(r"\.(lora_.*|weight|bias)$", "", module)
        entries.append(Entry(key, module, row, layer, target))
    if unknown or not any(entry.target for entry in entries):
        raise ValueError(
            f"{folder} adapts what has no adapter here. Received: "
            f"{unknown[:4]}, {len(unknown)} keys. Expected: projections of "
            "PaliGemma's decoder and vision tower, and its projector; and "
            "whole weights. Merge it with PEFT's `merge_and_unload` and load "
            "the merged model."
        )
    return entries


def _oldest(name):
    """Return a name as in `rows`, from the name of any version."""
    if name in hugging_face.HEADS:
        return hugging_face.HEADS[0]
    parts = (hugging_face.VISION, hugging_face.PROJECTOR, hugging_face.TEXT)
    for prefixes in parts:
        for prefix in sorted(prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                return prefixes[0] + name.removeprefix(prefix)
    return name


def newest(name):
    """Return a name of `rows` as in the current version of transformers."""
    for old, new in _NEWEST.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _sizes(name, weights):
    """Return a weight's (or its kernel's) number of layers, and layer shape."""
    place, last = name.rsplit("/", 1)
    if last in PIECES.values():
        name = f"{place}/kernel"
    weight = weights[TABLE if name == HEAD else name]
    return weight.num_layers, weight.layer_shape


def _shape(entry, lora, weights, rank=None):
    """Return the shape of one layer of an entry; of a piece, for a rank."""
    _, shape = _sizes(entry.row.name, weights)
    if entry.target is None:
        return shape
    if rank is None:
        ranks = lora.ranks.get(entry.target)
        rank = lora.rank if ranks is None else ranks[entry.layer]
    axes = len(entry.row.axes.split("->")[1].split())
    if entry.row.name.endswith("adapter_a"):
        return (*shape[: axes - 1], rank)
    if entry.row.name.endswith("adapter_b"):
        return (rank, *shape[1 - axes :])
    return shape[-axes:]


def _lora(config, entries, weights):
    """Return the `LoraConfig`, with ranks and alphas by layer if they differ.

    Ranks are those of the configuration, from which PEFT computes its scales:
    arrays of another rank do not fit.
    """
    ranks, alphas = {}, {}
    for entry in entries:
        layers, _ = _sizes(entry.row.name, weights)
        if entry.target is None or entry.layer >= layers:
            continue
        rank, alpha = peft_config.rank_and_alpha(config, entry.module)
        ranks.setdefault(entry.target, [0] * layers)[entry.layer] = rank
        default = [config["lora_alpha"]] * layers
        alphas.setdefault(entry.target, default)[entry.layer] = alpha
    largest = max((max(row) for row in ranks.values()), default=config["r"])

    def differing(lists, default):
        return {
            target: list(lists[target])
            for target in TARGETS
            if set(lists.get(target, ())) - {default}
        }

    return LoraConfig(
        largest,
        config["lora_alpha"],
        [target for target in TARGETS if target in ranks],
        config.get("lora_dropout") or 0.0,
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        bias=bool(config.get("lora_bias")),
        ranks=differing(ranks, largest),
        alphas=differing(alphas, config["lora_alpha"]),
    )


def _check_fits(config, lora, entries, weights, shapes):
    """Raise if entries do not fit the model, and list all of them."""
    needed = ["adapter_a", "adapter_b"]
    needed += ["adapter_bias"] if lora.bias else []
    needed += ["adapter_magnitude"] if lora.dora else []
    listed = [
        problem
        for entry in entries
        for problem in _misfits(entry, lora, needed, weights, shapes)
    ]
    listed += _missing(config, lora, entries, needed, weights)
    if listed:
        shown = "\n  ".join(listed)
        raise ValueError(
            f"The adapter does not fit the model in {len(listed)} places; "
            f"nothing was loaded.\n  {shown}\nIs it an adapter of this "
            "variant, and whole?"
        )


def _misfits(entry, lora, needed, weights, shapes):
    """Yield what is wrong with an entry."""
    key, name = entry.key, entry.row.name
    layers, _ = _sizes(name, weights)
    if entry.layer >= layers:
        yield f"unused: {key}, of {layers} layers"
    elif entry.target and name.rpartition("/")[2] not in needed:
        yield f"unused: {key}, which {CONFIG} does not tell of"
    else:
        shape = _shape(entry, lora, weights)
        expected = entry.row.checkpoint_shape(shape)
        if shapes[key] != expected:
            yield f"shape: {key} is {shapes[key]}, expected {expected}"
    if not entry.target and weights.get(name, weights[TABLE]).scales:
        yield (
            f"whole: {key}, which the model has in few bits: load it without "
            "`quantize`"
        )


def _missing(config, lora, entries, needed, weights):
    """Yield the pieces and whole modules that no entry has."""
    seen = {(entry.row.name, entry.layer) for entry in entries}
    for target in lora.targets:
        place = TARGETS[target]
        layers, _ = _sizes(f"{place}/kernel", weights)
        for layer, rank in enumerate(lora.ranks_of(target, layers)):
            if rank or not peft_config.names_layers(config):
                for piece in needed:
                    if (f"{place}/{piece}", layer) not in seen:
                        yield f"missing: {piece} of {target}, layer {layer}"
    modules = {f".{entry.module}." for entry in entries if entry.target is None}
    for name in config.get("modules_to_save") or ():
        if not any(f"{name}." in module for module in modules):
            yield f"missing: {name}, of modules_to_save"


def _tie(config, whole, weights):
    """Keep a separate table of the head only if it differs.

    PEFT copies the modules that it saves, and this unties them by default: if
    the embedding is saved, the head keeps the base's table. A table that was
    only resized stays tied.
    """
    if HEAD in whole and TABLE not in whole:
        if not peft_config.saves(config, "lm_head"):
            whole[TABLE] = whole.pop(HEAD)
    elif HEAD in whole:
        if np.array_equal(whole[HEAD], whole[TABLE]):
            del whole[HEAD]
    elif TABLE in whole and not config.get("ensure_weight_tying"):
        if peft_config.saves(config, "model.language_model.embed_tokens"):
            whole[HEAD] = weights[TABLE].read()
