"""`keras-paligemma serve` with adapters, used by OpenAI's client."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma.cli.serve import named_folder
from tests.helpers.processes import LEAN
from tests.helpers.text_models import build_tiny_model
from tests.serve.test_openai import PNG
from tests.serve.test_openai import messages
from tests.serve.test_openai import openai

pytestmark = pytest.mark.slow
NAMES = ("tiny", "first", "second")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny model, and the folder of its preset and two adapters."""
    folder = tmp_path_factory.mktemp("serve")
    model = build_tiny_model()
    model.save_to_preset(folder / "tiny")
    for seed, name in enumerate(NAMES[1:]):
        model.backbone.enable_lora(2, name=name, targets="decoder")
        random = np.random.default_rng(seed)
        for variable in model.trainable_variables:
            variable.assign(random.normal(size=variable.shape))
        # As two runs of `finetune` leave them.
        model.save_adapter(folder / name / "adapter", name=name)
    model.adapters.select(None)
    return model, folder


def test_who_names_an_adapter_gets_its_answers(model):
    model, folder = model
    inputs = {"images": PNG, "prompts": "caption en"}
    expected = {"tiny": model.generate(inputs)}
    for name in NAMES[1:]:
        with model.adapters.using(name):
            expected[name] = model.generate(inputs)
    assert len(set(expected.values())) == 3
    command = [sys.executable, "-m", "keras_paligemma", "serve"]
    command += [folder / "tiny", "--port", "0", "--batch", "2"]
    for name in NAMES[1:]:
        command += ["--adapter", f"{name}={folder / name / 'adapter'}"]
    with subprocess.Popen(
        command,
        env=os.environ | LEAN,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            address = server.stdout.readline().strip()
            # By default, other machines cannot connect.
            assert address.startswith("http://127.0.0.1:")
            asked = NAMES * 4
            with (
                openai.OpenAI(api_key="-", base_url=f"{address}/v1") as api,
                ThreadPoolExecutor(len(asked)) as threads,
            ):
                assert tuple(entry.id for entry in api.models.list()) == NAMES

                def ask(name):
                    reply = api.chat.completions.create(
                        model=name, messages=messages()
                    )
                    return reply.choices[0].message.content

                texts = list(threads.map(ask, asked))
        finally:
            server.terminate()
    assert texts == [expected[name] for name in asked]


def test_an_adapter_is_named_or_has_its_folders_name(tmp_path, monkeypatch):
    (tmp_path / "rate=1e-4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert named_folder("cats=run=1/adapter") == ("cats", "run=1/adapter")
    assert named_folder("runs/cats/") == ("cats", "runs/cats/")
    assert named_folder(".") == (tmp_path.name, ".")
    assert named_folder("rate=1e-4") == ("rate=1e-4", "rate=1e-4")


def test_a_saved_model_takes_no_options_of_a_checkpoint(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    arguments = ["serve", str(tmp_path), "--quantize", "int8"]
    with pytest.raises(ValueError, match="as it was exported.*'int8'"):
        CliRunner().invoke(
            cli.app,
            [*arguments, "--cache-dtype", "int8"],
            catch_exceptions=False,
        )
