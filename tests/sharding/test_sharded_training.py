"""Losses and tokens do not depend on where the weights lie."""

import socket
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="layouts are JAX's alone"
)


def start(script, *arguments):
    module = f"tests.sharding.{script}"
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(*processes):
    """Wait for processes, which end together: a host waits for the others."""
    try:
        for process in processes:
            out, told = process.communicate(timeout=300)
            assert process.returncode == 0, told[-5000:]
            assert out.splitlines()[-1] == "same everywhere"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_every_layout_trains_as_one_device():
    check(start("sharded_training"))


@pytest.mark.slow
def test_int8_and_two_hosts_do_as_one_device(tmp_path):
    # On eight devices of one process first; its files tell what is wanted.
    check(start("sharded_runs", tmp_path))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    check(*(start("host", tmp_path, number, port) for number in (0, 1)))
