"""Encoded pictures of every kind that a server receives, and the server."""

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


@pytest.fixture(scope="session")
def address(bare):
    """Start the example's server of the exported nano preset."""
    server = subprocess.Popen(
        [
            sys.executable,
            ROOT / "examples" / "serve" / "server.py",
            *(bare, "--port", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Without this package.
        env=os.environ | {"PYTHONPATH": ""},
        cwd=bare.parent,
        text=True,
    )
    with server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()
