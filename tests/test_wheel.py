"""The wheel: its contents, and its use without a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import keras_paligemma

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Unpack a wheel's files as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(
        directory=str(folder), versions=["standard"]
    )
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_it_carries_data_and_no_recipe(installed):
    shipped = installed / "keras_paligemma" / "shipped"
    names = {
        path.relative_to(shipped).as_posix() for path in shipped.rglob("*")
    }
    assert "presets/pali_gemma2_nano_112/model.safetensors" in names
    assert "presets/pali_gemma2_pt_3b_224.json" in names
    assert "examples/pictures/scenes.json" in names
    assert "examples/finetune/train.jsonl" in names
    assert "examples/words/word_0.png" in names
    assert not [name for name in names if name.endswith(".py")]
    assert {path.name for path in installed.iterdir() if path.is_dir()} == {
        "keras_paligemma",
        f"keras_paligemma-{keras_paligemma.__version__}.dist-info",
    }


def test_it_carries_types(installed):
    package = Path(keras_paligemma.__file__).parent
    stubs = {path.relative_to(package) for path in package.rglob("*.pyi")}
    shipped = {
        path.relative_to(installed / "keras_paligemma")
        for path in installed.rglob("*.pyi")
    }
    assert stubs and shipped == stubs
    assert (installed / "keras_paligemma" / "py.typed").exists()


def test_it_finds_its_data(installed, tmp_path):
    code = (
        "from keras_paligemma import demo, presets;"
        "print(demo.__file__, len(presets.names()));"
        "print(len(demo.read_pictures(demo.EXAMPLES / 'pictures')));"
        "examples = demo.EXAMPLES / 'finetune' / 'train.jsonl';"
        "print(len(demo.read_examples(examples)['prompts']))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert output[0].startswith(str(installed)) and output[0].endswith(" 23")
    assert output[1:] == ["6", "8"]
