"""Losses and tokens do not depend on where the weights lie."""

import subprocess
import sys
from pathlib import Path

import keras
import pytest


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
def test_every_layout_trains_as_one_device():
    result = subprocess.run(
        [sys.executable, "-m", "tests.distribution.sharded_training"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "same everywhere"
