"""Models of KerasHub in the same process do no harm."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("order", ["first", "second"])
def test_built_after_a_model_of_keras_hub(order, tmp_path):
    """KerasHub's first model puts `Functional` among our base classes."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.beside_keras_hub", order, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "ok" in result.stdout
