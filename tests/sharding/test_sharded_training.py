"""Losses and tokens do not depend on where the weights lie."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

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
    """Wait for processes, which end together; give the lines of each."""
    printed = []
    try:
        for process in processes:
            out, told = process.communicate(timeout=1800)
            assert process.returncode == 0, told[-5000:]
            printed.append(out.splitlines())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return printed


@pytest.fixture(scope="module")
def found():
    """What each check found, by name: one process starts all."""
    (lines,) = finish(start("sharded_training", *LAYOUTS, *OTHERS))
    return dict(map(json.loads, lines))


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_trains_as_one_device(found, case):
    assert found[case] == "same"


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_on_eight_devices(found, name):
    assert found[name] == "same"


@pytest.mark.slow
def test_int8_and_two_hosts_do_as_one_device(tmp_path):
    # On eight devices of one process first; its files tell what is wanted.
    (one,) = finish(start("sharded_runs", tmp_path))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = finish(
        *(start("host", tmp_path, number, port) for number in (0, 1))
    )
    for lines in (one, *hosts):
        assert lines[-1] == "same everywhere"
