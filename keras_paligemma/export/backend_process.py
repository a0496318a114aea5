"""Hand a model to a process that runs another backend.

The model is written as a preset beside the target: the bare model, and the
arrays of each named adapter, which can be read without the kernels.
"""

# Keras is imported by functions alone: the command line looks up a format's
# backend in `targets` before Keras chooses one.
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from keras_paligemma import atomic
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.storage import safetensors

ADAPTERS = "adapters.json"
ADAPTER = "adapter_{}.arrays"
# Arguments of `Adapters.add`.
PIECES, WHOLE = "pieces", "whole"
# Bytes of a weights file, which is in memory while it is written.
PIECE = 100_000_000


def write_in_backend(model, filepath, backend, module, *arguments):
    """Export a model in a process of another backend.

    Args:
        model: `PaliGemmaCausalLM`.
        filepath: str or path of the target.
        backend: str, Keras's name of the backend.
        module: str, module to run; its `main` gets a folder for `read`, the
            target and `arguments`.
        *arguments: str.

    Raises:
        RuntimeError: the process failed; the message has its error output.
    """
    target = atomic.local(filepath).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    package = Path(__file__).parents[2]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # The accelerator is occupied by the process that has the model.
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    # Beside the target: the default temporary folder may be in memory.
    with atomic.draft_folder(
        target.parent, f".{target.name}.preset-"
    ) as preset:
        _hand_over(model, preset)
        result = subprocess.run(
            [sys.executable, "-m", module, preset, target, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(
            f"The model was not exported. The process of {backend} ended with "
            f"{result.returncode} and said: {result.stderr[-2000:].strip()}"
        )


def _hand_over(model, folder):
    """Write a model where `read` finds it."""
    from keras_paligemma.models import exports

    adapters = model.adapters
    names = [] if adapters.merged is not None else list(adapters.configs)
    exports.export(
        folder,
        "keras",
        model.backbone,
        model.preprocessor,
        bare=bool(names),
        piece_size=PIECE,
    )
    for number, name in enumerate(names):
        arrays = {PIECES: adapters.values(name), WHOLE: adapters.whole(name)}
        path = folder / ADAPTER.format(number)
        save_file(
            {
                f"{kind}/{key}": np.asarray(array, order="C")
                for kind, part in arrays.items()
                for key, array in part.items()
            },
            path,
        )
    settings = {
        "adapters": {name: adapters.configs[name].to_dict() for name in names},
        "active": adapters.active,
    }
    (folder / ADAPTERS).write_text(json.dumps(settings), encoding="utf-8")


def read(folder, load_weights=True):
    """Read the model that `write_in_backend` handed over.

    Args:
        folder: str or path.
        load_weights: bool; if `False`, only adapters get values.

    Returns:
        `PaliGemmaCausalLM` with all adapters, the active one selected.
    """
    from keras_paligemma.compat import without_values
    from keras_paligemma.lora_config import LoraConfig
    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM

    folder = Path(folder)
    # The model's own dtype, independent of this process's floatx.
    dtype = formats.resolve(str(folder), False).config.backbone.dtype
    with contextlib.nullcontext() if load_weights else without_values():
        model = PaliGemmaCausalLM.from_preset(
            str(folder), load_weights, dtype, compile=False
        )
    settings = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    # In the original order: the first adapter sets the capacity.
    for number, (name, lora) in enumerate(settings["adapters"].items()):
        arrays = {PIECES: {}, WHOLE: {}}
        for key, array in load_file(folder / ADAPTER.format(number)).items():
            kind, key = key.split("/", 1)
            arrays[kind][key] = array
        model.adapters.add(name, LoraConfig(**lora), **arrays)
    if settings["adapters"]:
        model.adapters.select(settings["active"])
    return model


def read_in_parts(folder):
    """Read the model that `write_in_backend` handed over, tensor by tensor.

    Args:
        folder: str or path.

    Returns:
        Tuple of a `PaliGemmaCausalLM` of which only adapters have values, and
        an iterator of pairs of a variable and its array.
    """
    from keras_paligemma.compat import compiling_for

    # Graphs run on other machines too: do not reorder axes for this one.
    with compiling_for("cpu"):
        model = read(folder, load_weights=False)
    weights = model.backbone.weights_by_name()

    def arrays():
        for path in safetensors.find(folder):
            with safetensors.open_safetensors([path], True) as tensors:
                names = list(tensors.shapes)
            for name in names:
                unrolled = weights[name].form == "unrolled"
                for layer, variable in enumerate(weights[name].variables):
                    layer = layer if unrolled else None
                    yield variable, _read(path, name, layer)

    return model, arrays()


def _read(path, name, layer=None):
    """Read a tensor, or one layer of it, and close the file.

    Pages of a memory-mapped file count as memory until it is closed.
    """
    with safetensors.open_safetensors([path], True) as tensors:
        if layer is None:
            return tensors.read(name)
        return tensors.read_rows(name, layer, layer + 1)[0]
