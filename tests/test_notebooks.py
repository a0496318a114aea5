"""The first cell of a notebook installs on Colab and does nothing elsewhere.

`make notebooks` executes the whole notebooks, where this cell does nothing.
"""

import glob
import json
import re
import shutil
import sys
import tomllib
import types
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
# The features a notebook uses, and the extras that provide them.
NEEDS = {
    "import Batches": {"data", "train"},
    "import fit": {"train"},
    "import mean_average_precision": {"eval"},
    "import tensorflow": {"export"},
}

pytestmark = pytest.mark.any_backend


def code_cells(notebook):
    """Return the sources of a notebook's code cells."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def run_first_cell(notebook, monkeypatch, colab, accelerator=None):
    """Run the first cell as on Colab, and list its commands."""
    commands = []

    def line_magic(name, line):
        commands.append(f"{name} {line}".format(**names))

    shell = types.SimpleNamespace(
        run_line_magic=line_magic,
        system=lambda line: commands.append(line.format(**names)),
    )
    names = {"get_ipython": lambda: shell}
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("x"))
    else:
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    chips = ["/dev/accel0"] if accelerator == "tpu" else []
    monkeypatch.setattr(
        glob, "glob", lambda path: chips if "accel" in path else []
    )
    nvidia = "/usr/bin/nvidia-smi" if accelerator == "gpu" else None
    monkeypatch.setattr(shutil, "which", lambda name: nvidia)
    code = TransformerManager().transform_cell(code_cells(notebook)[0])
    exec(compile(code, str(notebook), "exec"), names)
    return commands


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "accelerator, jax",
    [(None, "jax"), ("gpu", "jax[cuda13]"), ("tpu", "jax[tpu]")],
)
def test_colab_gets_the_released_package(
    notebook, accelerator, jax, monkeypatch
):
    pip, clone, folder = run_first_cell(
        notebook, monkeypatch, True, accelerator
    )
    found = re.fullmatch(
        r'pip install -q "keras_paligemma\[([\w,]+)\]"( transformers)? "(.+)"',
        pip,
    )
    assert found and found[3] == jax, pip
    extras = set(found[1].split(","))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert extras <= set(project["project"]["optional-dependencies"])
    code = "\n".join(code_cells(notebook))
    for use, bring in NEEDS.items():
        assert use not in code or extras & bring, use
    assert clone.startswith("git clone ")
    assert folder == "cd keras-paligemma/notebooks"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_elsewhere_nothing_is_installed(notebook, monkeypatch):
    assert run_first_cell(notebook, monkeypatch, False) == []
