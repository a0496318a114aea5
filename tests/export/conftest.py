"""Encoded pictures of every kind that a server receives, and the server."""

import contextlib
import os
import subprocess
import sys

import pytest

from tests.helpers.encoded_pictures import ROOT
from tests.helpers.tiny_models import PRESETS


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """Export the nano preset without adapters, as the command line does."""
    folder = tmp_path_factory.mktemp("serve") / "served"
    cli = [sys.executable, "-m", "keras_paligemma", "export"]
    subprocess.run(
        [*cli, PRESETS / "pali_gemma2_nano_112", folder],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return folder


@contextlib.contextmanager
def serving(folder, *arguments, path=""):
    """Start the example's server, and yield its address."""
    server = subprocess.Popen(
        [
            sys.executable,
            ROOT / "examples" / "serve" / "server.py",
            *(folder, "--port", "0", *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": path},
        cwd=folder.parent,
        text=True,
    )
    with server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.fixture(scope="session")
def address(bare):
    """Return the address of a server of the exported nano preset."""
    with serving(bare) as address:
        yield address
