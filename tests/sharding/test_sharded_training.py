"""Losses and tokens do not depend on where the weights lie."""

import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from tests.helpers.checks import once
from tests.helpers.checks import reported

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)
# Strategy, mesh, form, what is trained (int4: LoRA over it), and whether the
# model answers then.
LAYOUTS = [
    "data 8x1 unrolled lora",
    "weights 4x2 scanned lora generate",
    "tensor 1x8 unrolled lora",
    "both 4x2 scanned lora generate",
    "weights 2x4 scanned full",
    "weights 2x4 scanned int4 generate",
]
OTHERS = ["answers", "fused attention", "products in parts", "meshes"]
# Of a model in int8 with adapters.
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
    "losses",
    "checkpoints",
    "a restored run",
    "a saved adapter",
    "a saved preset",
]


def start(script, *arguments):
    module = f"tests.sharding.{script}"
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """Wait for processes that end together; return the checks of each."""
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
    """What each check found, by name: one process starts all."""
    script = "sharded_training"
    (found,) = once(
        tmp_path_factory,
        script,
        lambda folder: finish(start(script, *LAYOUTS, *OTHERS)),
    )
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each check found: of one process, then of two hosts."""

    def compute(folder):
        # The files of the first are what the hosts have to repeat.
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
