"""The mask codec that a command is given is the one that it uses."""

import types

import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma import downloads
from keras_paligemma.evaluation import finetuning
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.training import run

pytestmark = pytest.mark.any_backend

FINETUNE = ("finetune", "--preset", "any", "--data", "any", "--output", "any")
REFCOCO = ("--benchmark", "refcoco_val")


def call(*arguments):
    """Run a command; raise its error."""
    CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


@pytest.fixture
def runs(monkeypatch):
    """Return a list of the fine-tunes that a command would have started."""
    started = []
    source = types.SimpleNamespace(codec=MaskCodec.embedded())
    monkeypatch.setattr(finetuning, "for_run", lambda *_: ({}, source))
    monkeypatch.setattr(run, "finetune", lambda *given: started.append(given))
    return started


def test_finetune_ignores_no_codec(runs):
    """It would train on the codes of the nano preset."""
    with pytest.raises(ValueError, match="--masks x.npz.*: --codec x.npz"):
        call(*FINETUNE, "--task", "segment", "--masks", "x.npz")
    with pytest.raises(ValueError, match="codec='x.npz'.*: --masks x.npz"):
        call(*FINETUNE, *REFCOCO, "--codec", "x.npz")
    assert not runs
    call(*FINETUNE, "--task", "segment", "--codec", "x.npz")
    # Masks to validate with may have a codec of their own.
    call(*FINETUNE, *REFCOCO, "--masks", "x.npz", "--codec", "y.npz")
    assert [settings.codec for settings, *_ in runs] == ["x.npz", "y.npz"]


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "/no/such/preset"),
        ("data", "convert", "/no/such/file", "target", "--to", "jsonl"),
    ],
)
def test_a_codec_may_be_on_a_hub(monkeypatch, command):
    """As for `evaluate --masks`; a `Path` has one slash of the two."""

    def download(handle, weights):
        raise OSError(f"offline: {handle}")

    monkeypatch.setattr(downloads, "download", download)
    with pytest.raises(OSError, match="offline: gs://bucket/vae-oid.npz"):
        call(*command, "--codec", "gs://bucket/vae-oid.npz")
