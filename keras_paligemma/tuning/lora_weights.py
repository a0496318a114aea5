"""Saving and loading the adapter in use as one file, as KerasHub does."""

import dataclasses
import json
import os
from pathlib import Path

import h5py
import numpy as np

from keras_paligemma.checkpoints.engine import BLOCKS
from keras_paligemma.compat import process
from keras_paligemma.compat import wait_for_all
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.lora_config import TARGETS
from keras_paligemma.lora_config import LoraConfig

SUFFIX = ".lora.h5"
# KerasHub's files have a group "lora" instead, with numbered layers.
GROUP = "keras_paligemma_lora"


def save(backbone, filepath):
    """Write the adapter in use; see `PaliGemmaBackbone.save_lora_weights`."""
    path, adapters = _path(filepath), backbone.adapters
    if adapters.loaded is None:
        raise ValueError(
            "There is no adapter to save. Expected: `enable_lora(rank)` or "
            "`load_adapter(folder)` first."
        )
    if adapters.whole(adapters.loaded):
        raise ValueError(
            "The adapter brings weights of the base, which this file has no "
            f"place for: {sorted(adapters.whole(adapters.loaded))}. Write it "
            "with `save_adapter`."
        )
    # Gathered by all processes, written by the first.
    arrays = adapters.values(adapters.loaded)
    if process()[0] == 0:
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with h5py.File(draft, "w") as file:
                group = file.create_group(GROUP)
                lora = adapters.configs[adapters.loaded]
                group.attrs["config"] = json.dumps(lora.to_dict())
                for name, array in arrays.items():
                    group[name] = array
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    wait_for_all("an adapter is written")


def load(backbone, filepath):
    """Load an adapter; see `PaliGemmaBackbone.load_lora_weights`."""
    path, adapters = _path(filepath), backbone.adapters
    try:
        with h5py.File(path, "r") as file:
            group = file.get(GROUP)
            if group is None:
                raise ValueError(
                    f"it holds {sorted(file)}. KerasHub numbers the layers of "
                    "its own model in such a file, which no other model can "
                    "read: merge the adapter there and save the preset"
                )
            lora = LoraConfig(**json.loads(group.attrs["config"]))
            values = {}

            def read(name, item):
                if isinstance(item, h5py.Dataset):
                    values[name] = np.asarray(item[()])

            group.visititems(read)
        _check_shapes(backbone, lora, values)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as an adapter: {error}. Expected: a file "
            "of `save_lora_weights`."
        ) from error
    if adapters.loaded is None:
        adapters.add("default", lora, values)
        return
    current = adapters.configs[adapters.loaded]
    # Dropout is an option of training, not a property of the values.
    lora = dataclasses.replace(lora, dropout=current.dropout)
    if lora != current:
        raise ValueError(
            f"{path} holds another adapter than the one in use. Received: "
            f"{lora}. Expected: {current}. Load it into a model without "
            "adapters: the file says which is made."
        )
    adapters.assign(values)


def _check_shapes(backbone, lora, values):
    """Raise `ValueError` if arrays do not match the adapter and the model."""
    weights = dequantized(backbone.weights_by_name())
    places = [TARGETS[target] for target in lora.targets]
    names = {f"{place}/{piece}" for place in places for piece in lora.pieces}
    if values.keys() != names:
        raise ValueError(
            f"it holds {sorted(values)}, and its targets have {sorted(names)}"
        )
    for place in places:
        pieces = {
            piece: values[f"{place}/{piece}"].shape for piece in lora.pieces
        }
        a, b = pieces.pop("adapter_a"), pieces.pop("adapter_b")
        layer = 1 if BLOCKS in place else 0
        kernel = weights[f"{place}/kernel"].shape
        outputs = b[:layer] + b[layer + 1 :]
        ranks = a[-1:] + b[layer : layer + 1]
        if (
            a[:-1] + b[layer + 1 :] != kernel
            or set(ranks) != {lora.rank}
            or any(shape != outputs for shape in pieces.values())
        ):
            raise ValueError(
                f"its {place} is A {a} and B {b}, with {pieces}, which make up "
                f"no kernel {kernel} of rank {lora.rank}"
            )


def _path(filepath):
    path = Path(os.path.expanduser(filepath))
    if not path.name.endswith(SUFFIX):
        raise ValueError(
            f"The file's name must end in {SUFFIX}. Received: {path}."
        )
    return path
