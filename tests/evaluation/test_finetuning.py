"""Fine-tuning settings and plans derived from a benchmark's record."""

import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma import metrics
from keras_paligemma.data import Batches
from keras_paligemma.evaluation import TrainingSource
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from keras_paligemma.evaluation import training_samples
from keras_paligemma.evaluation.finetuning import for_run
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.published_codecs import mask_codec
from keras_paligemma.training import run
from keras_paligemma.training.settings import read_settings
from tests.helpers.benchmark_data import change_sample
from tests.helpers.benchmark_data import chartqa_human
from tests.helpers.benchmark_data import make_data
from tests.helpers.benchmark_data import refcoco_testa
from tests.helpers.oracle import make_preprocessor

NANO = "pali_gemma2_nano_112"


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def call(*arguments):
    result = CliRunner().invoke(
        cli.app,
        [str(argument) for argument in arguments],
        catch_exceptions=False,
    )
    return result.output


def test_finetune_takes_the_record_and_the_command_line_wins(data, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text(f'preset = "{NANO}"\nbatch_size = 2\n')
    output = call(
        *("finetune", "--benchmark", "vizwizvqa", "--config", config),
        *("--data", data, "--output", tmp_path / "run", "--dry-run"),
        *("--batch-size", 4),
    )
    # 12 examples in batches of 4. The record has ten epochs and 48 tokens.
    assert "12 examples, 3 steps an epoch of 4, 30 steps" in output
    assert "prompts of 48 tokens, responses of 48" in output


def test_a_file_of_settings_goes_before_the_record(data, tmp_path):
    given = {"preset": NANO, "data": str(data), "output": str(tmp_path / "run")}
    (tmp_path / "settings.toml").write_text("epochs = 3\n")
    defaults, source = for_run("vizwizvqa", given)
    settings = read_settings(tmp_path / "settings.toml", defaults, **given)
    assert (settings.epochs, settings.learning_rate) == (3, 1e-5)
    assert (settings.batch_size, settings.lora_rank) == (256, 0)
    assert len(source) == 12


def test_adapters_need_no_frozen_weights(data):
    given = {"preset": NANO, "data": str(data), "image_size": 448}
    assert for_run("gqa", given)[0]["freeze"] == ["vision_encoder/*"]
    assert "freeze" not in for_run("gqa", given | {"lora_rank": 8})[0]


def test_the_transfers_dropout_reaches_the_decoder(data):
    given = {"preset": NANO, "data": str(data / "samples.jsonl")}
    defaults, _ = for_run("screen2words", given)
    settings = read_settings(None, defaults, output="run", **given)
    settings = dataclasses.replace(settings, lora_rank=2)
    blocks = run.build(settings).backbone.text_decoder.blocks
    assert {block.dropout for block in blocks.each_block()} == {0.3}


def test_a_jsonl_file_brings_its_own_examples(data):
    given = {"preset": NANO, "data": str(data / "samples.jsonl")}
    settings, source = for_run("textvqa", given)
    assert source is None and settings["epochs"] == 5
    with pytest.raises(ValueError, match="needs --preset and --data"):
        for_run("textvqa", {"preset": NANO})


def test_examples_are_prompts_and_all_answers(data):
    change_sample(data, 1, answers=["A", "b", ""])
    source = TrainingSource(open_samples(find_benchmark("vizwizvqa"), data))
    assert source[1]["prompts"] == "answer en what?"
    assert source[1]["responses"] == ["A", "b"]
    lowered = TrainingSource(open_samples(find_benchmark("stvqa"), data))
    assert lowered[1]["responses"] == ["a", "b"]
    assert source.where(1).endswith("id 'q1'")


@pytest.mark.parametrize("answers", ["", None])
def test_a_sample_without_an_answer_is_named(data, answers):
    change_sample(data, 0, answers=answers)
    source = TrainingSource(open_samples(find_benchmark("vizwizvqa"), data))
    batches = Batches(source, make_preprocessor(), 2, shuffle=False)
    with pytest.raises(ValueError, match="id 'q0': There is no answer. Exp"):
        next(iter(batches))


def test_refcoco_is_learned_in_the_codes_of_a_codec(tmp_path):
    refcoco_testa(tmp_path)
    benchmark = find_benchmark("refcoco_val")
    given = {"preset": NANO, "data": str(tmp_path)}
    samples = open_samples(benchmark, tmp_path)
    perfect = TrainingSource(samples, MaskCodec.embedded())[0]["responses"]
    assert perfect.startswith("<loc0256><loc0256><loc0767><loc0512><seg")
    [iou] = metrics.refcoco(
        [perfect],
        [samples.truth(0)["boxes"]],
        [samples.truth(0)["masks"]],
        MaskCodec.embedded().decode,
    ).columns["miou"]
    # The last location is 1023 of 1024, so one row and one column are cut off.
    assert iou == 0.9
    with pytest.raises(ValueError, match="split 'train'"):
        for_run("refcoco_val", given)
    weights = {n: 0 * w for n, w in MaskCodec.embedded().weights.items()}
    np.savez(tmp_path / "codec.npz", **weights)
    with pytest.raises(ValueError, match="gs://big_vision.*--codec or --masks"):
        mask_codec(2304)
    assert not mask_codec(2304, tmp_path / "codec.npz").decode([[1] * 16]).any()


def test_test_splits_are_not_learned_from(tmp_path):
    examples = [{"example_id": "1_de", "image": None, "question": "?"}]
    for name in ("xgqa", "marvl", "xm3600", "nocaps", "countbenchqa"):
        with pytest.raises(ValueError, match=f"{name} has no training split"):
            training_samples(find_benchmark(name), examples)


def test_both_kinds_of_charts_are_learned_from(tmp_path):
    chartqa_human(tmp_path)
    (tmp_path / "test").rename(tmp_path / "train")
    for kind in ("human", "augmented"):
        old = tmp_path / "train" / f"test_{kind}.json"
        old.rename(old.with_name(f"train_{kind}.json"))
    samples = training_samples(find_benchmark("chartqa_human"), tmp_path)
    assert len(samples) == 6


def test_plan_takes_batch_and_lengths():
    arguments = "plan --preset pali_gemma2_pt_3b_448 --slice v5e-8 --estimate"
    arguments = [*arguments.split(), "--json"]
    same = [*("--batch-size", 256, "--lora-rank", 0)]
    same += [*("--prompt-length", 32, "--response-length", 32)]
    found = json.loads(call(*arguments, "--benchmark", "vqav2"))
    assert found == json.loads(call(*arguments, *same))
    other = call(*arguments, "--benchmark", "vqav2", "--batch-size", 8)
    assert json.loads(other) == json.loads(
        call(*arguments, *same, "--batch-size", 8)
    )


def test_plan_counts_the_pictures_of_a_prompt(data, tmp_path):
    arguments = "plan --preset pali_gemma2_pt_3b_224 --estimate --json".split()
    same = "--batch-size 256 --lora-rank 0 --prompt-length 64".split()
    same += "--response-length 64 --slice v5e-64".split()
    one, two = (
        json.loads(call(*arguments, *same, "--pictures", count))
        for count in (1, 2)
    )
    record = call(*arguments, "--benchmark", "nlvr2", "--slice", "v5e-64")
    assert json.loads(record) == two and two["job"]["pictures"] == 2
    for name in ("hbm_gib", "flops"):
        assert two["tried"][0][name] > one["tried"][0][name]
    assert two["tried"][0]["bounds_s"]["compute"] == pytest.approx(
        two["tried"][0]["flops"] / (64 * 197e12), abs=1e-4
    )
    pairs = make_data(tmp_path / "pairs")
    for row in range(12):
        change_sample(pairs, row, images=["0.png", "1.png"], sentence="same")
    output = call(
        *("finetune", "--benchmark", "nlvr2", "--preset", NANO),
        *("--data", pairs, "--output", tmp_path / "run", "--dry-run"),
        *("--batch-size", 4),
    )
    assert "2 pictures of 112 pixels" in output
