"""Fine-tunes from settings and from the command line."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import cli
from keras_paligemma.training import Settings
from keras_paligemma.training.run import build
from keras_paligemma.training.run import read_settings

NANO = "pali_gemma2_nano_112"


@pytest.fixture
def data(tmp_path):
    """Four pictures, a line each, and a line that is broken."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(4):
        pixels = random.integers(0, 256, (20, 30, 3), "uint8")
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        line = {"image": f"{number}.png", "prefix": "caption en"}
        lines.append(json.dumps(line | {"suffix": "a ghost"}))
    lines.append('{"image": "none.png", "prefix": "caption en", "suffix": "a"}')
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def call(*arguments):
    result = CliRunner().invoke(
        cli.app, [str(one) for one in arguments], catch_exceptions=False
    )
    return result.exit_code, result.output


@pytest.mark.filterwarnings("ignore:Examples skipped so far")
def test_from_the_command_line_and_again(data):
    (data / "settings.toml").write_text(
        f'preset = "{NANO}"\nepochs = 1\nskip_errors = true\n'
    )
    arguments = [
        *("finetune", "--config", data / "settings.toml"),
        *("--data", data / "train.jsonl", "--output", data / "run"),
        *("--batch-size", 2, "--lora-rank", 2, "--lora-targets", "query"),
        *("--set", "label_smoothing=0.1", "--set", "save_every=1"),
    ]
    code, output = call(*arguments, "--dry-run")
    assert code == 0
    assert "5 examples, 2 steps an epoch of 2, 2 steps" in output
    assert "GiB" in output and not (data / "run").exists()
    code, output = call(*arguments)
    assert code == 0, output
    assert "Skipped examples: 1" in output and "line 5: images" in output
    settings = json.loads((data / "run" / "settings.json").read_text())
    assert settings["label_smoothing"] == 0.1
    assert len((data / "run" / "log.csv").read_text().splitlines()) == 2
    model = PaliGemmaCausalLM.from_preset(NANO)
    model.load_adapter(data / "run" / "adapter")
    assert model.adapters.known["default"].targets == ("query",)
    # The same command again, with more epochs: it goes on.
    code, output = call(*arguments, "--epochs", 2)
    assert code == 0, output
    lines = (data / "run" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1"]


def test_settings_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'lora_rank'"):
        read_settings(lora_ranks=2)
    with pytest.raises(ValueError, match="Missing: data, output"):
        read_settings(preset=NANO)
    (tmp_path / "x.toml").write_text("preset = ")
    with pytest.raises(ValueError, match="is no TOML file"):
        read_settings(tmp_path / "x.toml")
    code, output = call_error("finetune", "--set", "freeze=vision")
    assert code == 1 and "a string in quotes" in output


def call_error(*arguments):
    result = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    return result.exit_code, str(result.exception)


def test_weights_themselves_and_what_is_frozen():
    settings = Settings(NANO, "", "", lora_rank=0, freeze=("vision_encoder/*",))
    model = build(settings)
    assert model.backbone.adapters.slots is None
    paths = {one.path for one in model.trainable_variables}
    assert paths and not any("vision_encoder" in path for path in paths)
