"""Our models work in a process that also builds KerasHub models.

KerasHub's first model puts `Functional` among our base classes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checks import once
from tests.helpers.checks import reported
from tests.helpers.processes import LEAN

CHECKS = [
    "a task of KerasHub",
    "generate",
    "a .keras file",
    "a preset",
    "layers",
    "summary",
    "KerasHub's model",
]


@pytest.fixture(scope="module", params=["first", "second"])
def found(request, tmp_path_factory):
    """Return the checks' results, with ours imported first or second."""

    def compute(folder):
        module, order = "tests.beside_keras_hub", request.param
        result = subprocess.run(
            [sys.executable, "-m", module, order, str(folder)],
            cwd=Path(__file__).parents[1],
            env=os.environ | LEAN,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return reported(result.stdout.splitlines())

    return once(tmp_path_factory, f"keras_hub_{request.param}", compute)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_built_after_a_model_of_keras_hub(found, name):
    assert found[name] == "passed"
