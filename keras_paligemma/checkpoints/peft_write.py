"""Write adapters in the format of Hugging Face's PEFT."""

import functools
import json
import re

import numpy as np

from keras_paligemma import atomic
from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.checkpoints.engine import LAYER
from keras_paligemma.checkpoints.peft import CONFIG
from keras_paligemma.checkpoints.peft import HEAD
from keras_paligemma.checkpoints.peft import ROOT
from keras_paligemma.checkpoints.peft import TABLE
from keras_paligemma.checkpoints.peft import WEIGHTS
from keras_paligemma.checkpoints.peft import newest
from keras_paligemma.checkpoints.peft import rows
from keras_paligemma.checkpoints.storage.safetensors import write_file
from keras_paligemma.lora_config import TARGETS

# A module's vector, and the array that is saved with it if the module is whole.
_BESIDE = {"bias": "kernel", "beta": "gamma"}


def arrays(lora, pieces, whole, architecture):
    """Yield an adapter's tensors, one at a time; see `peft.read`.

    Yields:
        Pairs of key and array, cut to the rank of each layer.
    """
    table = rows(architecture)
    for target in lora.targets:
        place = TARGETS[target]
        for name in sorted(
            name for name in pieces if name.startswith(f"{place}/")
        ):
            row = table[name]
            layers = pieces[name] if BLOCKS in name else pieces[name][None]
            ranks = lora.ranks_of(target, len(layers))
            for key, layer, rank in zip(
                row.keys(len(layers)), layers, ranks, strict=True
            ):
                if name.endswith("adapter_a"):
                    layer = layer[..., :rank]
                if name.endswith("adapter_b"):
                    layer = layer[:rank]
                if rank:
                    yield ROOT + newest(key), row.write(layer)
    targets = tuple(f"{TARGETS[target]}/" for target in lora.targets)
    for name, value in whole.items():
        row = table[name]
        layers = value if BLOCKS in name else value[None]
        for key, layer in zip(row.keys(len(layers)), layers, strict=True):
            if name.startswith(targets):
                module, _, last = key.rpartition(".")
                key = f"{module}.base_layer.{last}"
            yield ROOT + newest(key), row.write(layer)


def describe(lora, whole, layers, architecture, base=None):
    """Return the content of `adapter_config.json` for these tensors.

    Args:
        lora: `LoraConfig`.
        whole: dict of name to array, weights that it replaces as a whole.
        layers: dict of target to its number of layers.
        architecture: see `hugging_face.rows`.
        base: str or `None`, name of the base model.
    """
    table = rows(architecture)
    modules, ranks, alphas = [], {}, {}
    for target in lora.targets:
        name = table[f"{TARGETS[target]}/kernel"].key
        name = re.escape(newest(name).removesuffix(".weight"))
        module = functools.partial(name.replace, re.escape(LAYER))
        count = layers[target]
        of_target = lora.ranks_of(target, count)
        chosen = [str(layer) for layer, rank in enumerate(of_target) if rank]
        numbers = r"\d+" if len(chosen) == count else f"({'|'.join(chosen)})"
        modules += [module(numbers)] if chosen else []
        for layer, rank in enumerate(of_target):
            if rank not in (0, lora.rank):
                ranks[module(str(layer))] = rank
        for layer, alpha in enumerate(lora.alphas.get(target, ())):
            if alpha != lora.alpha and of_target[layer]:
                alphas[module(str(layer))] = alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": "|".join(modules),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "inference_mode": True,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "lora_bias": lora.bias,
        "fan_in_fan_out": False,
        "layers_to_transform": None,
    } | _describe_whole(lora, whole, table)


def _describe_whole(lora, whole, table):
    """Return the modules and biases that an adapter replaces as a whole."""
    biases, modules = [], []
    for name, value in whole.items():
        place, last = name.rsplit("/", 1)
        if last in _BESIDE and f"{place}/{_BESIDE[last]}" not in whole:
            biases.append(place)
        elif name != TABLE or HEAD in whole:
            # A table without its own head is tied to the head, and not listed.
            keys = table[name].keys(len(value))
            modules += [newest(key).rpartition(".")[0] for key in keys]
    targets = {TARGETS[target] for target in lora.targets}
    of_targets = "lora_only" if targets >= {*biases} else "all"
    return {
        "bias": of_targets if biases else "none",
        "modules_to_save": sorted(set(modules)) or None,
    }


def write(folder, config, arrays):
    """Write an adapter that PEFT loads onto transformers' PaliGemma.

    An existing adapter is replaced atomically; see `atomic.whole_folder`.

    Args:
        folder: path.
        config: dict, from `describe`.
        arrays: iterable of pairs of key and array.
    """
    # safetensors writes an array's memory and ignores its strides.
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays}
    text = json.dumps(config, indent=2) + "\n"
    with atomic.whole_folder(folder, CONFIG, [WEIGHTS]) as draft:
        write_file(draft / WEIGHTS, arrays)
        (draft / CONFIG).write_text(text, encoding="utf-8")
