"""Interrupted runs, invalid data, and the files written at the end."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras_hub
import pytest
import typer
from typer.testing import CliRunner

from keras_paligemma import metrics
from keras_paligemma.cli import app
from keras_paligemma.cli.evaluate import evaluate as command
from keras_paligemma.evaluation import evaluate
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from keras_paligemma.evaluation import read_predictions
from keras_paligemma.evaluation import score
from keras_paligemma.evaluation import settings_of
from keras_paligemma.evaluation import training_samples
from keras_paligemma.evaluation.predictions import append
from keras_paligemma.evaluation.predictions import resume
from tests.helpers.benchmark_data import change_sample
from tests.helpers.benchmark_data import make_data
from tests.helpers.benchmark_data import put
from tests.helpers.oracle import Oracle
from tests.helpers.processes import LEAN

BENCHMARK = find_benchmark("vizwizvqa")


def make_oracle(samples):
    return Oracle(
        samples, [samples.truth(n)["answers"][0] for n in range(len(samples))]
    )


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def run(data, output, **options):
    samples = open_samples(BENCHMARK, data)
    oracle = make_oracle(samples)
    options = {"batch_size": 5, "progress": False} | options
    return oracle, evaluate(oracle, BENCHMARK, data, output, **options)


def test_report_and_results(data, tmp_path):
    samples = open_samples(BENCHMARK, data)
    right = [samples.truth(n)["answers"][0] for n in range(12)]
    oracle = Oracle(samples, ["<wrong>", *right[1:]])
    result = evaluate(oracle, "VizWizVQA", data, tmp_path / "run", worst=2)
    assert result.values["acc"] == pytest.approx(100 * 11 / 12)
    low, high = result.intervals["acc"]
    assert 60 < low < result.values["acc"] < high == 100
    assert result.card == {"acc": 76.4} and result.column == "224-3B"
    assert "card, 224-3B: 76.4" in str(result)
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["values"]["acc"] == result.values["acc"]
    assert facts["worst"] == ["q0", "q1"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("<img") == 2
    assert "&lt;wrong&gt;" in page and "<wrong>" not in page
    assert page.index("q0") < page.index("q1")
    rows = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert list(rows) == samples.ids and rows["q3"] == right[3]


def test_run_that_ended_computes_nothing_again(data, tmp_path):
    first, one = run(data, tmp_path / "run")
    again, two = run(data, tmp_path / "run")
    assert (first.calls, again.calls) == (3, 0)
    assert one.values == two.values


def test_every_length_of_a_file_is_gone_on_with(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data", rows=5)
    run(data, tmp_path / "whole", batch_size=2)
    # Hundreds of small files do not need to reach the disk.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    ids = open_samples(BENCHMARK, data).ids
    lines = whole.split(b"\n")[:-1]
    path = tmp_path / "cut.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        done = resume(path, ids, 2)
        assert done % 2 == 0 or done == 5
        assert path.read_bytes() == whole[: sum(map(len, lines[:done])) + done]
        texts = [json.loads(line)["prediction"] for line in lines]
        for first in range(done, 5, 2):
            rows = range(first, min(first + 2, 5))
            append(path, [(ids[row], texts[row]) for row in rows])
        assert path.read_bytes() == whole


def test_hosts_go_on_at_the_batch_that_all_lack(tmp_path):
    path, ids = tmp_path / "part.jsonl", list("abcdef")
    append(path, [(id, "") for id in ids])
    assert resume(path, ids, 2) == 6
    assert resume(path, ids, 2, most=4) == 4
    assert list(read_predictions(path)) == list("abcd")
    assert resume(path, ids, 3) == 3


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    make_data(tmp_path / "data", rows=400)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.evaluation.killed_evaluation"),
            *(str(tmp_path), "20", "7"),
        ],
        env=os.environ | LEAN,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "20 kills at" in result.stdout


@pytest.mark.slow
def test_eight_devices_write_the_same_file(tmp_path):
    make_data(tmp_path / "data", rows=24)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.evaluation.sharded_evaluation"),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env=os.environ | LEAN | {"KERAS_BACKEND": "jax"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.endswith("same\n")


def test_two_hosts_write_a_part_each(data, tmp_path, monkeypatch):
    """Write the parts of two hosts in turn; the first host joins them."""
    from keras_paligemma import compat

    samples = open_samples(BENCHMARK, data)
    monkeypatch.setattr(compat, "wait_for_all", lambda place: None)
    monkeypatch.setattr(compat, "least", lambda value: value)
    run(data, tmp_path / "one", batch_size=4)
    # The second host's part is its share of each global batch.
    for index in (1, 0):
        monkeypatch.setattr(compat, "process", lambda index=index: (index, 2))
        result = evaluate(
            make_oracle(samples),
            BENCHMARK,
            data,
            tmp_path / "two",
            batch_size=2,
            shard=(index, 2),
        )
        assert (result is None) == (index == 1)
    part = read_predictions(tmp_path / "two" / "predictions-1-of-2.jsonl")
    assert list(part) == ["q2", "q3", "q6", "q7", "q10", "q11"]
    files = [
        tmp_path / folder / "predictions.jsonl" for folder in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_limit(data, tmp_path):
    oracle, result = run(data, tmp_path / "run", limit=3)
    assert (result.samples, result.limited, oracle.calls) == (3, True, 1)
    assert "not the card's split" in str(result)


def test_captions_are_searched_with_beams(data, tmp_path):
    used = []

    class Watched(Oracle):
        def generate(self, inputs, max_new_tokens, beams):
            used.append(beams)
            return super().generate(inputs, max_new_tokens)

    captions = find_benchmark("coco_captions")
    for row in range(12):
        change_sample(data, row, references=[f"a {row}"])
    samples = open_samples(captions, data)
    model = Watched(samples, [f"a {row}" for row in range(12)])
    evaluate(model, captions, data, tmp_path / "run", batch_size=6)
    assert used == [2, 2]


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (3, {"answers": None}, r"1 of 12 .* no right 'answers'.*\['q3'\]"),
        (3, {"answers": []}, r"no right 'answers'.*\['q3'\]"),
        (3, {"answers": ["a", None]}, r"no right 'answers'.*\['q3'\]"),
        (4, {"question": None}, "id 'q4': The prompt .* needs .*'question'"),
        (4, {"question": "\n"}, "id 'q4': The prompt .* needs .*'question'"),
        (4, {"id": "q2"}, r"1 ids more than once.*\['q2'\]"),
        (5, {"images": "none.png"}, r"no picture at their path.*\['q5'\]"),
        (5, {"images": None}, "line 6: a sample has `images`"),
    ],
)
def test_bad_samples_are_named_before_anything_runs(
    row, fields, message, data, tmp_path
):
    samples = open_samples(BENCHMARK, data)
    oracle = make_oracle(samples)
    change_sample(data, row, **fields)
    with pytest.raises(ValueError, match=message):
        evaluate(oracle, BENCHMARK, data, tmp_path / "run")
    assert not oracle.calls and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "fields", "wrong", "message"),
    [
        ("textvqa", {}, {"answers": ["a"] * 9}, "ten answers"),
        ("gqa", {}, {"answers": [["a"]]}, "'answers' is no text"),
        ("vqav2", {}, {"answer_types": "Other"}, r"\['Other'\]"),
        ("pubchem", {"molecules": "C"}, {"molecules": "what"}, "no SMILES"),
        ("grandstaff", {"scores": "4c"}, {"scores": 5}, "'scores' is no text"),
        (
            "coco_captions",
            {"references": ["a cat"]},
            {"references": 5},
            "no list|no text",
        ),
        (
            "xgqa",
            {"answers": "a", "language": "de"},
            {"answers": [["a"]]},
            "'answers' is no text",
        ),
    ],
)
def test_answers_that_no_metric_reads_are_named_before_anything_runs(
    name, fields, wrong, message, data, tmp_path
):
    benchmark = find_benchmark(name)
    for row in range(12):
        change_sample(data, row, **fields)
    for row, code in enumerate(benchmark.languages):
        change_sample(data, row, language=code)
    model = make_oracle(open_samples(BENCHMARK, make_data(tmp_path / "right")))
    change_sample(data, 7, **wrong)
    with pytest.raises(ValueError, match=rf"ids \['q7'\].*({message})"):
        evaluate(model, benchmark, data, tmp_path / "run")
    assert not model.calls and not (tmp_path / "run").exists()


def test_library_that_lacks_is_no_fault_of_the_samples(
    data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "rdkit.Chem", None)
    for row in range(12):
        change_sample(data, row, molecules="C")
    with pytest.raises(ValueError, match="^A molecule's canonical form is"):
        evaluate(None, "pubchem", data, tmp_path / "run")


def test_one_sample_without_an_optional_field_keeps_that_of_others(
    data, tmp_path
):
    simple = find_benchmark("tallyqa_simple")
    for row in range(12):
        change_sample(data, row, answers=str(row))
    with pytest.raises(ValueError, match=r"'acc/simple'.*\['simple'\] in"):
        evaluate(None, simple, data, tmp_path / "run")
    for row in range(1, 12):
        change_sample(data, row, simple=row % 2)
    samples = open_samples(simple, data)
    model = Oracle(samples, ["0", *["1"] * 11])
    result = evaluate(model, simple, data, tmp_path / "run")
    assert result.values["acc/simple"] == pytest.approx(100 / 6)
    assert result.values["acc/complex"] == 0
    assert "no sample counts" not in str(result)


@pytest.mark.parametrize("images", [None, 5, [], ["0.png", None]])
def test_pictures_that_are_no_paths_are_named(images, tmp_path):
    line = {"id": 1, "images": images, "question": "what?", "answers": ["a"]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match="line 1: `images` is a path or a"):
        open_samples(BENCHMARK, tmp_path)


@pytest.mark.parametrize("images", ["0.png", ["0.png"], ["0.png"] * 3])
def test_another_number_of_pictures_is_named(images, data):
    change_sample(data, 0, images=images, sentence="One.")
    samples = open_samples(find_benchmark("nlvr2"), data)
    with pytest.raises(ValueError, match="id 'q0': .* 2 pictures a prompt"):
        samples.unopened(0)


def test_picture_that_cannot_be_read_is_named(data, tmp_path):
    samples = open_samples(BENCHMARK, data)
    oracle = make_oracle(samples)
    (data / "7.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="id 'q7': .*cannot be read|id 'q7'"):
        evaluate(oracle, BENCHMARK, data, tmp_path / "run", batch_size=5)
    # The first batch is saved.
    done = read_predictions(tmp_path / "run" / "predictions.jsonl")
    assert list(done) == samples.ids[:5]


def test_predictions_of_other_samples_are_named(data, tmp_path):
    samples = open_samples(BENCHMARK, data)
    some = {id: "" for id in samples.ids[1:]} | {"x": ""}
    with pytest.raises(ValueError, match=r"1, \['q0'\]. Unknown: 1, \['x'\]"):
        score(BENCHMARK, some, samples)
    path = tmp_path / "twice.jsonl"
    append(path, [("q0", ""), ("q0", "")])
    with pytest.raises(ValueError, match=r"more than once.*\['q0'\]"):
        read_predictions(path)
    path.write_text('{"id": "q0"}\n')
    with pytest.raises(ValueError, match="line 1 is no prediction"):
        read_predictions(path)


def test_folder_of_another_run_is_refused(data, tmp_path):
    run(data, tmp_path / "run")
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"'samples': \(12, 3\)"):
        run(data, tmp_path / "run", limit=3)
    with pytest.raises(ValueError, match=r"\('vizwizvqa', 'okvqa'\)"):
        evaluate(
            make_oracle(open_samples(BENCHMARK, data)),
            "okvqa",
            data,
            tmp_path / "run",
        )
    samples = open_samples(BENCHMARK, data)
    with pytest.raises(ValueError, match=r"'split': \('val', 'test'\)"):
        evaluate(
            make_oracle(samples),
            dataclasses.replace(BENCHMARK, split="test"),
            data,
            tmp_path / "run",
        )
    right = [samples.truth(row)["answers"][0] for row in range(12)]
    tuned = Oracle(samples, right, weight=1e-3)
    with pytest.raises(ValueError, match="'model_sha256': "):
        evaluate(tuned, BENCHMARK, data, tmp_path / "run")
    drawn = make_oracle(samples)
    drawn.sampler = keras_hub.samplers.TopKSampler(5)
    with pytest.raises(ValueError, match="'sampler': .*'TopKSampler'"):
        evaluate(drawn, BENCHMARK, data, tmp_path / "run")
    path = tmp_path / "run" / "predictions.jsonl"
    assert path.read_bytes() == before
    append(path, [("q99", "")])
    with pytest.raises(ValueError, match="holds rows of another run.*'q99'"):
        run(data, tmp_path / "run")


def test_answers_to_other_pictures_or_prompts_are_not_scored(data, tmp_path):
    output = tmp_path / "run"
    run(data, output)
    path = output / "predictions.jsonl"
    before = path.read_bytes()
    change_sample(data, 3, question="which?")
    with pytest.raises(ValueError, match="another run.*'q3': prompt .*which"):
        run(data, output)
    change_sample(data, 3, question="what?", images="4.png")
    samples = open_samples(BENCHMARK, data).first(3)
    model = Oracle(samples, ["", "", ""])
    with pytest.raises(ValueError, match="another run.*'q3': image .*4.png"):
        evaluate(model, BENCHMARK, data, output)
    change_sample(data, 3, images="3.png")
    record = output / "predictions.jsonl.run.json"
    record.rename(tmp_path / "record.json")
    with pytest.raises(ValueError, match="or of an earlier version"):
        run(data, output)
    (tmp_path / "record.json").rename(record)
    again, _ = run(data, output)
    assert again.calls == 0 and path.read_bytes() == before


def test_the_box_that_is_asked_about_belongs_to_a_run(data, tmp_path):
    widgets = find_benchmark("widgetcap")
    for row in range(12):
        change_sample(
            data, row, references=["a"], red_box=[0, 0, 0.5, row / 12 + 0.01]
        )
    samples = open_samples(widgets, data)
    model = Oracle(samples, ["a"] * 12)
    evaluate(model, widgets, data, tmp_path / "run")
    change_sample(data, 2, red_box=[0.5, 0.5, 1, 1])
    with pytest.raises(ValueError, match="another run.*id 'q2': image"):
        evaluate(model, widgets, data, tmp_path / "run")


def test_empty_split(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(
        ValueError, match="no samples for vizwizvqa, split 'val'"
    ):
        open_samples(BENCHMARK, tmp_path)


def test_judge_is_asked_where_there_is_one(data):
    docci = find_benchmark("docci")
    samples = open_samples(docci, data)
    texts = dict.fromkeys(samples.ids, "A cat. It sits.")
    assert set(score(docci, texts, samples).values()) == {
        "avg_char",
        "avg_sent",
    }
    judges = {"nes": lambda texts, right: [0.25] * len(texts)}
    values = score(docci, texts, samples, judges=judges).values()
    assert values == {"avg_char": 15.0, "avg_sent": 2.0, "nes": 0.25}
    others = {"toxicity": judges["nes"]}
    assert (
        "toxicity" not in score(docci, texts, samples, judges=others).values()
    )


def test_values_without_a_judge_are_said_to_need_one(data, tmp_path):
    docci = find_benchmark("docci")
    samples = open_samples(docci, data)
    oracle = Oracle(samples, ["A cat."] * 12)
    result = evaluate(oracle, docci, data, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    for text in (str(result), page):
        assert "needs a judge, the share of sentences" in text
    with pytest.raises(ValueError, match="`judge`, a function of predictions"):
        metrics.judged("radgraph_f1", ["a"], ["a"])


def test_another_split_has_no_number_beside_it(tmp_path):
    texts = find_benchmark("textvqa")
    entry = {"question_id": 1, "image_id": "a", "question": "what?"}
    entry |= {"answers": ["it"] * 10}
    put(tmp_path, "TextVQA_0.5.1_test.json", {"data": [entry]})
    put(tmp_path, "test_images/a.jpg", (8, 6))
    samples = open_samples(texts, tmp_path, "test")
    model = Oracle(samples, ["it"])
    result = evaluate(model, texts, tmp_path, tmp_path / "run", split="test")
    assert result.card == {} and result.benchmark.split == "test"
    # Samples know their split, which may not be another.
    again = evaluate(model, texts, samples, tmp_path / "run")
    assert again.card == {} and again.benchmark.split == "test"
    with pytest.raises(ValueError, match="one split.*Received: 'val'"):
        evaluate(model, texts, samples, tmp_path / "run", split="val")
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "of the split test" in page and "the card has no number" in page


def test_a_split_that_data_cannot_have_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="samples.jsonl holds one split.*'x'"):
        run(data, tmp_path / "run", split="x")
    rows = [{"image": "1.png", "question": "what?", "answer": "it"}]
    with pytest.raises(ValueError, match="list holds one split.*'x'"):
        open_samples(find_benchmark("activitynet_qa"), rows, "x")
    assert len(open_samples(BENCHMARK, data, "val")) == 12


def test_samples_of_another_benchmark_are_refused(data, tmp_path):
    """They may be of another subset, and have prompts of their own."""
    for row in range(12):
        change_sample(data, row, answers=str(row))
    samples = open_samples(find_benchmark("chartqa_human"), data)
    oracle = Oracle(samples, [str(row) for row in range(12)])
    with pytest.raises(ValueError, match="of chartqa_augmented.*chartqa_human"):
        evaluate(oracle, "chartqa_augmented", samples, tmp_path / "run")
    assert not oracle.calls and not (tmp_path / "run").exists()


def test_kinds_of_charts_are_those_of_the_benchmark(data):
    human = find_benchmark("chartqa_human")
    assert len(open_samples(human, data)) == 12
    for row in range(12):
        kind = "human" if row % 3 else "augmented"
        change_sample(data, row, answers=str(row), kinds=kind)
    assert open_samples(human, data).ids[:3] == ["q1", "q2", "q4"]
    assert open_samples(find_benchmark("chartqa_augmented"), data).ids == [
        *("q0", "q3", "q6", "q9")
    ]
    # Training mixes both.
    assert len(training_samples(human, data)) == 12
    published = [
        {
            **{"question_id": row, "image": "1.png", "question": "how many?"},
            **{"answer": "2", "kinds": "human" if row else "augmented"},
        }
        for row in range(3)
    ]
    assert open_samples(human, published).ids == ["1", "2"]
    change_sample(data, 4, kinds=None)
    with pytest.raises(ValueError, match=r"1 of 12 .*'kinds'.*\['q4'\]"):
        open_samples(human, data)


def test_a_sample_without_a_language_is_named(data):
    english = find_benchmark("xm3600_en")
    for row in range(12):
        change_sample(data, row, references=["a"], language="en")
    for row in (0, 5):
        change_sample(data, row, language=None)
        with pytest.raises(ValueError, match=rf"'language'.*'q{row}'"):
            open_samples(english, data)


def test_refcoco_of_a_published_size_asks_for_its_codec(data, tmp_path):
    refcoco = find_benchmark("refcoco_val")
    for row in range(12):
        box, mask = [0, 0, 0.5, 0.5], {"size": [8, 8], "counts": [0, 64]}
        change_sample(data, row, sentence="it", boxes=box, masks=mask)
    samples = open_samples(refcoco, data)
    with pytest.raises(ValueError, match="compares masks.*`decode`"):
        score(refcoco, dict.fromkeys(samples.ids, ""), samples)
    oracle = Oracle(samples, [f"nothing {row}" for row in range(12)])
    with pytest.raises(ValueError, match="of the size 3B .*vae-oid.npz"):
        evaluate(oracle, refcoco, data, tmp_path / "run")
    oracle.backbone.text_config.hidden_dim = 64
    result = evaluate(oracle, refcoco, data, tmp_path / "run")
    assert result.values["invalid"] == 100 and result.values["miou"] == 0


def test_mean_over_languages_is_not_that_over_samples(data):
    xgqa = find_benchmark("xgqa")
    codes = [*xgqa.languages, *["de"] * 5]
    for row, code in enumerate(codes):
        change_sample(data, row, language=code, answers="yes")
    samples = open_samples(xgqa, data)
    texts = {
        id: "yes" if code == "de" else "no"
        for id, code in zip(samples.ids, codes, strict=True)
    }
    scores = score(xgqa, texts, samples)
    values = scores.values()
    assert values["acc"] == pytest.approx(1 / 7)
    assert (values["acc/de"], values["acc/bn"]) == (1, 0)
    assert scores.quality.tolist() == [code == "de" for code in codes]
    # A resample may lack a language, which its mean then ignores.
    low, high = scores.intervals(draws=32)["acc"]
    assert 1 / 7 <= low <= high <= 1


def test_command_on_the_nano_preset(data, tmp_path):
    app = typer.Typer()
    app.command()(command)
    arguments = ["--preset", "pali_gemma2_nano_112", "--data", str(data)]
    output = tmp_path / "run"

    def call(*more):
        return CliRunner().invoke(
            app, [*arguments, *more], catch_exceptions=False
        )

    with pytest.raises(ValueError, match="'vizwizvq'. The nearest: vizwizvqa"):
        call("--benchmark", "vizwizvq")
    result = call(
        *("--benchmark", "vizwizvqa", "--output", str(output)),
        *("--limit", "3", "--batch-size", "2"),
    )
    assert result.exit_code == 0
    assert "VizWizVQA (val), 3 samples" in result.output
    assert list(read_predictions(output / "predictions.jsonl")) == [
        *("q0", "q1", "q2")
    ]


def test_two_hosts_on_the_command_line(tmp_path):
    """Processes that share a run write the same files as one process."""
    scenes = Path(__file__).parents[2] / "examples" / "pictures"
    lines = [
        {"id": path.stem, "images": str(path), "question": "how many objects?"}
        for path in sorted(scenes.glob("scene_*.png"))
    ]
    lines = [json.dumps(line | {"answers": "2"}) + "\n" for line in lines]
    (tmp_path / "samples.jsonl").write_text("".join(lines))
    arguments = ["evaluate", "--benchmark", "countbenchqa", "--data", tmp_path]
    arguments += ["--preset", "pali_gemma2_nano_112", "--batch-size"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = LEAN | {
        "KERAS_BACKEND": "jax",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "keras_paligemma", *arguments, "1"]
    command += ["--output", tmp_path / "two", "--multi-host"]
    hosts = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"KERAS_DISTRIBUTION_PROCESS_ID": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in "01"
    ]
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert not any(host.returncode for host in hosts), said
    assert "CountBenchQA, 5 samples" in said[0]
    assert "CountBenchQA" not in said[1]
    command = ["--output", str(tmp_path / "one")]
    result = CliRunner().invoke(app, [*map(str, arguments), "2", *command])
    assert result.exit_code == 0
    one, two = (
        tmp_path / name / "predictions.jsonl" for name in ("one", "two")
    )
    assert one.read_bytes() == two.read_bytes()
    assert any(read_predictions(one).values())
    second = tmp_path / "two" / "predictions-1-of-2.jsonl"
    assert list(read_predictions(second)) == ["scene_1", "scene_3"]


def test_settings_have_the_lengths_of_a_benchmark_without_a_transfer():
    assert settings_of(find_benchmark("icdar2015"), 448) == {
        "prompt_length": 512,
        "response_length": 512,
    }
