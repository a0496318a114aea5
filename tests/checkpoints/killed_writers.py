"""Kill checkpoint writers at each of their steps; run by its test.

A writer is a forked process. A step is the creation of an array, or a call that
changes a folder or waits for the disk.
"""

import itertools
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

# Neither a model nor a backend that starts threads is needed.
os.environ["KERAS_BACKEND"] = "numpy"

import numpy as np

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints import peft
from keras_paligemma.checkpoints import peft_write
from keras_paligemma.checkpoints import writing
from keras_paligemma.checkpoints.lazy_tensors import lazy_tensors
from tests.helpers.killing import counted

CALLS = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}

home, *cases = sys.argv[1:]
# The names are those of a model. A few values of each array are enough.
checkpoint = formats.resolve("pali_gemma2_nano_112")
config = replace(checkpoint.config, preprocessor=None)
with checkpoint.open() as tensors:
    weights = {key: tensors.read(key)[..., :4] for key in tensors.shapes}
peft_keys = ["q_proj.lora_A.weight", "q_proj.lora_B.weight"]


def write(folder, to, value, step=lambda: None):
    """Write a model or an adapter in which every value is `value`."""

    if to == "peft":
        arrays = ((key, np.full((2, 3), float(value))) for key in peft_keys)
        arrays = ((key, step() or array) for key, array in arrays)
        peft_write.write(folder, ADAPTER, arrays)
        return
    arrays = {
        key: np.full_like(weight, value) for key, weight in weights.items()
    }
    rows = [engine.Row(key, key) for key in arrays]
    tensors = engine.Arrays(arrays)
    tensors = lazy_tensors(arrays, rows, tensors, lambda array: step())
    writing.write(folder, to, config, tensors)


def read(folder, to):
    """Return the single value of a model or an adapter, or `None`."""
    try:
        if to == "peft":
            _, open_files = peft.find(folder)
        else:
            open_files = formats.find(folder).open
    except ValueError:
        return None
    with open_files() as tensors:
        values = [tensors.read(key) for key in tensors.shapes]
    numbers = {float(number) for array in values for number in np.unique(array)}
    assert len(values) > 1 and len(numbers) == 1, numbers
    return numbers.pop()


def visible(folder):
    """List files that are not hidden."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(
        str(name)
        for name in names
        if (folder / name).is_file() and not name.parts[0].startswith(".")
    )


def attempt(to, before, kill_at, kind):
    """Kill a writer at a given step and return what it left."""
    folder = Path(home) / "a folder" / "model"
    folder.parent.mkdir()
    if before != "absent":
        folder.mkdir()
    if before == "old":
        write(folder, to, 1)
        (folder / "notes.txt").write_text("mine")
    child = os.fork()
    if not child:
        left, step = [kill_at], lambda: None
        if kind == "arrays":
            step = counted(step, left)
        else:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name), left))
        write(folder, to, 2, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    found = [kind, killed, visible(folder), read(folder, to)]
    print(json.dumps([f"{to} {before}", *found]))
    shutil.rmtree(folder.parent)
    return killed


for case in cases:
    last = (len(peft_keys) if case.startswith("peft") else len(weights)) - 1
    for number in (0, 1, last):
        assert attempt(*case.split(), number, "arrays")
    # Kill at each call in turn, until the writer finishes.
    for number in itertools.count():
        if not attempt(*case.split(), number, "calls"):
            break
