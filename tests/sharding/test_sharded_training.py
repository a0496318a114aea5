"""Losses and tokens do not depend on the weights' sharding."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.helpers.checks import once
from tests.helpers.checks import reported
from tests.helpers.processes import LEAN

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
# Strategy, mesh, form, trained weights (int4: LoRA on an int4 model), and
# whether the model then answers.
LAYOUTS = [
    "data 8x1 unrolled lora",
    "weights 4x2 scanned lora generate",
    "tensor 1x8 unrolled lora",
    "both 4x2 scanned lora generate",
    "weights 2x4 scanned full",
    "weights 2x4 scanned int4 generate",
]
OTHERS = [
    "answers",
    "fused attention",
    "products in parts",
    "last batches",
    "replicas",
    "meshes",
]
# For an int8 model with adapters.
OF_ONE_PROCESS = [
    "shards of weights",
    "bytes while loading",
    "bytes of a device",
    "shards of moments",
    "losses",
    "a killed run's losses",
    "a killed run's shards",
    "a killed run's weights",
    "a saved preset",
    "a saved adapter",
]
OF_A_HOST = [
    "one part of the data",
    "two parts of the data",
    "a last batch that the hosts do not share evenly",
    "losses",
    "checkpoints",
    "a restored run",
    "a saved adapter",
    "a saved preset",
    "stop strings",
]


def start(script, *arguments):
    module = f"tests.sharding.{script}"
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ | LEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """Wait for cooperating processes; return the checks of each."""
    found = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=1800)
            assert process.returncode == 0, errors[-5000:]
            found.append(reported(out.splitlines()))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return found


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Return the checks' results by name; one process runs all of them."""
    script = "sharded_training"
    (found,) = once(
        tmp_path_factory,
        script,
        lambda folder: finish(start(script, *LAYOUTS, *OTHERS)),
    )
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the checks' results of one process and then of two hosts."""

    def compute(folder):
        # The hosts must reproduce the first process's files.
        one = finish(start("sharded_runs", folder))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        hosts = (start("host", folder, number, port) for number in (0, 1))
        return one + finish(*hosts)

    return once(tmp_path_factory, "sharded_runs", compute)


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_trains_as_one_device(layouts, case):
    assert layouts[case] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_on_eight_devices(layouts, name):
    assert layouts[name] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_int8_does_as_on_one_device(runs, name):
    assert runs[0][name] == "passed"


@pytest.mark.slow
@pytest.mark.parametrize("host", [1, 2])
@pytest.mark.parametrize("name", OF_A_HOST)
def test_two_hosts_do_as_one_process(runs, host, name):
    assert runs[host][name] == "passed"
