"""A model handed to a process of its own, which has another backend.

It travels as a preset beside the target: the bare model, and each of its named
adapters as a folder of PEFT's.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from keras_paligemma.models import exports

ADAPTERS = "adapters.json"


def write_elsewhere(model, filepath, backend, module, *arguments):
    """Write a model by a process of another backend.

    Args:
        model: `PaliGemmaCausalLM`.
        filepath: str or path of the target.
        backend: str, Keras's name of it.
        module: str, whose `main` is called with a folder for `read`, the
            target and `arguments`.
        *arguments: str.

    Raises:
        RuntimeError: that process stopped; with what it said.
    """
    target = Path(filepath).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    package = Path(__file__).parents[2]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # The accelerator belongs to the process that has the model.
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    # Beside the target: the usual place may be a memory.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.preset-", dir=target.parent
    ) as preset:
        _hand_over(model, Path(preset))
        told = subprocess.run(
            [sys.executable, "-m", module, preset, str(target), *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
    if told.returncode:
        raise RuntimeError(
            f"The model was not exported. The process of {backend} ended with "
            f"{told.returncode} and said: {told.stderr[-2000:].strip()}"
        )


def _hand_over(model, folder):
    """Write a model for `read`."""
    adapters = model.adapters
    names = [] if adapters.merged is not None else list(adapters.known)
    exports.export(
        folder, "keras", model.backbone, model.preprocessor, bare=bool(names)
    )
    for number, name in enumerate(names):
        model.save_adapter(folder / f"adapter_{number}", name=name)
    told = {"names": names, "active": adapters.active}
    (folder / ADAPTERS).write_text(json.dumps(told), encoding="utf-8")


def read(folder):
    """Read the model that `write_elsewhere` handed over.

    Args:
        folder: str or path.

    Returns:
        `PaliGemmaCausalLM`, with all adapters, the one in use selected.
    """
    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM

    folder = Path(folder)
    model = PaliGemmaCausalLM.from_preset(str(folder), compile=False)
    told = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
    # In their order: the first makes the room.
    for number, name in enumerate(told["names"]):
        model.load_adapter(folder / f"adapter_{number}", name)
    if told["names"]:
        model.adapters.select(told["active"])
    return model
