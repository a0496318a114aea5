"""Losses and tokens do not depend on where the weights lie."""

import subprocess
import sys
from pathlib import Path

import keras
import pytest


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
@pytest.mark.parametrize(
    "script",
    [
        # Every layout trains and generates as one device does.
        "sharded_training",
        # Weights in int8 are loaded, adapted, resumed and saved in shards.
        "sharded_runs",
    ],
)
def test_eight_devices_do_as_one(script):
    result = subprocess.run(
        [sys.executable, "-m", f"tests.distribution.{script}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "same everywhere"
