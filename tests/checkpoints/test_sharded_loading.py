"""Weights go from the file straight to their shards."""

import subprocess
import sys
from pathlib import Path

import keras
import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
def test_every_device_gets_its_shard_alone():
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.sharded_loading"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == ["sharded", "10"]
