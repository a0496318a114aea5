"""Weights are loaded from the file directly to their shards."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.helpers.checks import once
from tests.helpers.checks import reported
from tests.helpers.processes import LEAN


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the result of each check: each device gets only its shard."""

    def compute(folder):
        result = subprocess.run(
            [sys.executable, "-m", "tests.checkpoints.sharded_loading"],
            cwd=Path(__file__).parents[2],
            env=os.environ | LEAN,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return reported(result.stdout.splitlines())

    return once(tmp_path_factory, "sharded_loading", compute)


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
@pytest.mark.parametrize("name", ["copies", "bytes", "logits"])
def test_every_device_gets_its_shard_alone(found, name):
    assert found[name] == "passed"
