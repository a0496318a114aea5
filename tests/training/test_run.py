"""Fine-tuning from settings and from the command line."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import cli
from keras_paligemma.training import Settings
from keras_paligemma.training import checkpoint
from keras_paligemma.training import run
from keras_paligemma.training.run import build
from keras_paligemma.training.run import compile_model
from keras_paligemma.training.settings import read_settings
from keras_paligemma.tuning.memory import estimate_memory

NANO = "pali_gemma2_nano_112"


@pytest.fixture
def data(tmp_path):
    """Write four pictures with a line each, and one invalid line."""
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
        cli.app,
        [str(argument) for argument in arguments],
        catch_exceptions=False,
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
        *("--label-smoothing", 0.1, "--save-every", 1),
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
    assert model.adapters.configs["default"].targets == ("query",)
    # Running the same command again changes nothing.
    adapter = data / "run" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    code, output = call(*arguments)
    assert code == 0, output
    assert adapter.read_bytes() == before
    # With more epochs, training continues.
    code, output = call(*arguments, "--epochs", 2)
    assert code == 0, output
    lines = (data / "run" / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1"]


def test_empty_answers_from_the_command_line(data, monkeypatch):
    read = []

    def fit(model, batches, *args, **kwargs):
        read.append(next(iter(batches)))

    monkeypatch.setattr(checkpoint, "fit", fit)
    line = {"image": "0.png", "prefix": "detect cat", "suffix": ""}
    (data / "train.jsonl").write_text(f"{json.dumps(line)}\n")
    arguments = [
        *("finetune", "--preset", NANO, "--data", data / "train.jsonl"),
        *("--output", data / "run", "--batch-size", 1, "--lora-rank", 1),
    ]
    code, output = call_error(*arguments)
    assert code == 1 and "line 1: `suffix` is empty" in output
    assert "--allow-empty" in output and not read
    code, output = call(*arguments, "--allow-empty")
    assert code == 0, output
    (_, _, weights) = read[0]
    assert weights.sum() == 1  # The end of the answer is learned.


def test_runs_of_earlier_versions_go_on(data):
    """Their settings lack fields that were added later."""
    settings = Settings(NANO, "train.jsonl", str(data / "run"))
    run._keep_settings(settings, data / "run")
    (data / "run" / "checkpoints" / "3").mkdir(parents=True)
    path = data / "run" / "settings.json"
    kept = json.loads(path.read_text())
    assert kept.pop("allow_empty") is False
    path.write_text(json.dumps(kept))
    run._check_output(settings, data / "run")
    with pytest.raises(ValueError, match=r"'allow_empty': \(False, True\)"):
        changed = dataclasses.replace(settings, allow_empty=True)
        run._check_output(changed, data / "run")


def test_settings_are_replaced_whole(tmp_path, monkeypatch):
    """A run that is killed while it writes them again goes on."""
    settings = Settings(NANO, "train.jsonl", str(tmp_path))
    run._keep_settings(settings, tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    write = Path.write_text

    def die(path, text, **kwargs):
        write(path, text[:9], **kwargs)
        raise InterruptedError

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(InterruptedError):
        run._keep_settings(settings, tmp_path)
    run._check_output(settings, tmp_path)


def test_accumulation_leaves_the_schedule_its_length():
    settings = Settings(NANO, "", "", gradient_accumulation=4, lora_rank=2)
    model = build(settings)
    compile_model(model, settings, steps=100)
    model.optimizer.build(model.trainable_variables)
    rates = []
    for batch in (50, 99, 100):
        model.optimizer._iterations.assign(batch)
        rates.append(float(model.optimizer.learning_rate))
    assert rates[0] > 0.4 * settings.learning_rate > rates[1] > 0
    assert rates[2] < 1e-9


def test_nothing_has_a_word(tmp_path):
    (tmp_path / "x.toml").write_text('remat = "none"')
    given = {"preset": NANO, "data": "d", "output": "o"}
    assert read_settings(tmp_path / "x.toml", **given).remat is None


def test_settings_that_mean_nothing(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'lora_rank'"):
        read_settings(lora_ranks=2)
    with pytest.raises(ValueError, match="Missing: data, output"):
        read_settings(preset=NANO)
    (tmp_path / "x.toml").write_text("preset = ")
    with pytest.raises(ValueError, match="is no TOML file"):
        read_settings(tmp_path / "x.toml")


def call_error(*arguments):
    result = CliRunner().invoke(
        cli.app, [str(argument) for argument in arguments]
    )
    return result.exit_code, str(result.exception)


def test_weights_themselves_and_what_is_frozen():
    settings = Settings(NANO, "", "", lora_rank=0, freeze=("vision_encoder/*",))
    model = build(settings)
    assert model.backbone.adapters.capacity is None
    paths = {variable.path for variable in model.trainable_variables}
    assert paths and not any("vision_encoder" in path for path in paths)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("epochs", "2", "an integer of 1"),
        ("epochs", 1.5, "an integer of 1"),
        ("epochs", True, "an integer of 1"),
        ("gradient_accumulation", 0, "an integer of 1"),
        ("learning_rate", "1e-4", "a number of 1e-12"),
        ("learning_rate", math.nan, "a number of 1e-12"),
        ("warmup", 2, "a number of 0 to 0.999999"),
        ("lora_alpha", 0, "a number of 1e-12 to 1000000.0 or None"),
        ("lora_targets", 3, "a list of strings"),
        ("skip_errors", "false", "True or False"),
        ("quantize", "int2", "'int8' or 'int4' or None"),
        ("data", 3, "a string"),
        ("seed", -1, "an integer of 0 to 4294967295"),
    ],
)
def test_values_that_mean_nothing(name, value, expected):
    given = {"preset": NANO, "data": "d", "output": "o", name: value}
    with pytest.raises(ValueError, match=f"{name} must be {expected}"):
        read_settings(**given)


def test_every_setting_is_an_option_with_help():
    shown = call("finetune", "--help")[1]
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"\n  {name} [^\n]*\n? +[A-Z]", shown), name
    code, output = call("finetune", "--epochs", "1.5")
    assert code == 2 and "Invalid value for '--epochs'" in output


def test_one_pattern_needs_no_list():
    given = {"preset": NANO, "data": "d", "output": "o", "lora_rank": 0}
    assert read_settings(freeze="*/mlp/*", **given).freeze == ("*/mlp/*",)


def test_runs_that_would_train_nothing(data):
    (data / "none.jsonl").write_text("")
    arguments = [
        *("finetune", "--preset", NANO, "--data", data / "train.jsonl"),
        *("--output", data / "run", "--batch-size", 2),
        "--skip-errors",
    ]
    for more, words in (
        (["--gradient-accumulation", 9], "an update takes 9 batches"),
        (["--freeze", "*/mlp/*"], "Adapters train alone"),
        (["--lora-rank", 0, "--freeze", "*"], "Nothing would be trained"),
        (
            ["--lora-rank", 0, "--quantize", "int4", "--dry-run"],
            "has no gradients",
        ),
        (["--validation", data / "none.jsonl"], "nothing to validate with"),
    ):
        code, output = call_error(*arguments, *more)
        assert code == 1 and words in output, (more, output)
        assert not (data / "run").exists()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_preset_with_an_adapter_is_refused(random_preset, tmp_path, rank):
    model = PaliGemmaCausalLM.from_preset(random_preset)
    model.enable_lora(2)
    model.save_to_preset(tmp_path / "adapted")
    settings = Settings(str(tmp_path / "adapted"), "d", "o", lora_rank=rank)
    with pytest.raises(ValueError, match=r"with LoraConfig.*merge\(\)"):
        run.build(settings)


def test_another_runs_output_is_kept(data):
    settings = Settings(NANO, "train.jsonl", str(data / "run"))
    # Settings may still change if a run failed before its first checkpoint.
    bad = dataclasses.replace(settings, batch_size=999)
    run._keep_settings(bad, data / "run")
    run._keep_settings(settings, data / "run")
    (data / "run" / "checkpoints" / "3").mkdir(parents=True)
    before = (data / "run" / "settings.json").read_text()
    more = dataclasses.replace(settings, epochs=2)
    run._keep_settings(more, data / "run")
    other = dataclasses.replace(settings, lora_rank=4)
    with pytest.raises(ValueError, match=r"'lora_rank': \(8, 4\)"):
        run._check_output(other, data / "run")
    arguments = ["--preset", NANO, "--data", data / "train.jsonl"]
    arguments += ["--output", data / "run", "--lora-rank", 4, "--dry-run"]
    code, output = call_error("finetune", *arguments)
    assert code == 1 and "other settings" in output
    after = (data / "run" / "settings.json").read_text()
    assert after == before.replace('"epochs": 1', '"epochs": 2')


def test_sums_of_gradients_are_planned():
    model = build(Settings(NANO, "", "", lora_rank=2))
    plain, summed = (
        estimate_memory(model.backbone, 2, 8, 4, accumulates=given)
        for given in (False, True)
    )
    trained = sum(
        math.prod(variable.shape) for variable in model.trainable_variables
    )
    key = "gradients and moments"
    assert plain.pop(key) == 12 * trained and summed.pop(key) == 16 * trained
    assert plain == summed


def test_the_plan_counts_updates():
    settings = Settings(NANO, "", "", gradient_accumulation=4, epochs=2)
    text = run.plan(build(settings), settings, 24, 3)
    # The last two steps cause no update.
    assert "6 steps, 1 updates of 4 steps" in text


@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/run"])
def test_an_output_that_is_a_file(data, output):
    arguments = ["--preset", NANO, "--data", data / "train.jsonl"]
    arguments += ["--output", data / output, "--dry-run"]
    code, output = call_error("finetune", *arguments)
    assert code == 1 and "The output must be a folder" in output


def test_an_output_that_is_an_address(data, monkeypatch):
    monkeypatch.chdir(data)
    before = sorted(data.iterdir())
    arguments = ["--preset", NANO, "--data", "train.jsonl"]
    code, output = call_error("finetune", *arguments, "--output", "gs://b/run")
    assert code == 1 and "an address, 'gs://b/run'" in output
    assert sorted(data.iterdir()) == before


def test_encodings_of_a_settings_file(tmp_path):
    given = {"preset": NANO, "data": "d", "output": "o"}
    path = tmp_path / "x.toml"
    path.write_text("epochs = 3", encoding="utf-8-sig")
    assert read_settings(path, **given).epochs == 3
    for encoding in ("utf-16", "latin-1"):
        path.write_text("epochs = 3 # é", encoding=encoding)
        with pytest.raises(ValueError, match="x.toml is not UTF-8"):
            read_settings(path, **given)


def test_a_broken_example_tells_the_commands_way_out(data):
    arguments = ["--preset", NANO, "--data", data / "train.jsonl"]
    arguments += ["--output", data / "run", "--batch-size", 5]
    code, output = call_error("finetune", *arguments)
    assert code == 1 and "--skip-errors" in output


def test_settings_of_unknown_users_do_not_exist():
    with pytest.raises(FileNotFoundError, match="~nobody_of_this_name"):
        read_settings("~nobody_of_this_name/settings.toml")
