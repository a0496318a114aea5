"""Every row and number of the model card is in the registry and can be run."""

import csv
import inspect
import math
import re
import runpy
import string
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from keras_paligemma import metrics
from keras_paligemma.cli.benchmarks import benchmarks as command
from keras_paligemma.evaluation import Benchmark
from keras_paligemma.evaluation import benchmarks
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import settings_of
from keras_paligemma.evaluation.layouts import LAYOUTS
from keras_paligemma.evaluation.registry import COLUMNS
from keras_paligemma.evaluation.truth import COLUMNS as METRICS
from tests.evaluation.model_card import FIXTURE

DOCS = Path(__file__).parents[2] / "docs"

# The card's names for the values of the additional benchmarks.
VALUES = {
    **{"Precision": "precision", "Recall": "recall", "F1": "f1"},
    **{"S-TEDS": "s_teds", "TEDS": "teds"},
    **{"GriTS-Top": "grits_top", "GriTS-Con": "grits_con"},
    **{"CER": "cer", "LER": "ler", "SER": "ser", "Full Match": "full_match"},
    **{"avg#char": "avg_char", "avg#sent": "avg_sent", "NES %": "nes"},
    **{"CIDEr": "cider", "BLEU4": "bleu-4", "Rouge-L": "rouge"},
    "RadGraph F1": "radgraph_f1",
    "VSR zeroshot split (test)": "acc of vsr_zeroshot",
    "VSR random split (test)": "acc of vsr_random",
}


def numbers_of(benchmark):
    """Return the registry's values of a row, in the format of the fixture."""
    for value, numbers in benchmark.card.items():
        for column, number in numbers.items():
            yield benchmark.title, value, column, number


def test_every_number_of_the_card_is_there_and_no_other():
    wanted = set()
    with open(FIXTURE, encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    for title, column, number in rows:
        number = "nan" if number == "-" else str(float(number))
        if column in COLUMNS:
            wanted.add((title, "", column, number))
            continue
        size, _, label = column.removeprefix("PaliGemma 2 ").partition(", ")
        value, _, name = VALUES[label].partition(" of ")
        wanted.add((title, f"{value}{name}", size, number))
    found = set()
    for name, benchmark in benchmarks().items():
        own = name if name.startswith("vsr") else ""
        for title, value, column, number in numbers_of(benchmark):
            value = "" if column in COLUMNS else f"{value}{own}"
            found.add((title, value, column, str(float(number))))
    assert found == wanted
    assert len(rows) == 48 * 6 + 36
    assert len({title for title, *_ in found}) == 57


@pytest.mark.parametrize(
    "benchmark", benchmarks().values(), ids=lambda one: one.name
)
def test_record_can_be_run(benchmark):
    columns = METRICS[benchmark.metric]
    function = getattr(metrics, benchmark.metric)
    names = [column.strip("[]") for column in columns]
    parameters = inspect.signature(function).parameters
    assert set(names) | set(benchmark.arguments) < set(parameters)
    # The data provides the fields that the prompt and the metric require.
    fields = [
        name
        for _, name, _, _ in string.Formatter().parse(benchmark.prompt)
        if name
    ]
    needed = {column for column in columns if not column.startswith("[")}
    if benchmark.layout is None:
        assert {*fields, *needed} <= set(benchmark.fields) | {"language"}
    if benchmark.response is not None:
        assert benchmark.response in benchmark.fields
    assert benchmark.layout is None or benchmark.layout in LAYOUTS
    assert benchmark.kind and benchmark.data and benchmark.split
    assert (benchmark.frames is None) == (benchmark.stride is None)
    assert benchmark.value in benchmark.card
    unlike = set(benchmark.finetune) - {"448", "dropout"}
    assert unlike <= {
        *("learning_rate", "weight_decay", "epochs", "batch_size"),
        *("label_smoothing", "freeze"),
    }


# From section 6 of `paligemma2.md`: learning rate, decay, epochs and batch
# size, at 224 and 448, then tokens.
TRANSFERS = """
ai2d 1e-5/1e-6/10/256 1e-5/1e-6/10/256 128
aokvqa_mc 5e-6/0/15/128 5e-6/0/15/128 128
chartqa_human 1e-5/1e-6/30/256 1e-5/1e-6/30/256 48
coco35l 1e-5/1e-6/5/256 1e-5/1e-6/5/256 32
docvqa 1e-5/1e-6/10/256 1e-5/1e-6/10/256 32
gqa 1e-5/0/1/256 1e-5/0/1/256 32
infovqa 1e-5/1e-6/3/32 1e-5/1e-6/3/32 48
nlvr2 1e-5/1e-6/3/256 3e-6/3e-7/10/256 64
ocrvqa 3e-6/0/3/128 3e-6/0/3/128 32
okvqa 5e-6/0/10/128 5e-6/0/10/128 32
refcoco_val 3e-5/0/100/256 1e-5/0/100/256 48
rsvqa_hr 1e-5/0/1/256 1e-5/0/1/256 32
rsvqa_lr 3e-6/0/3/256 3e-6/0/3/256 32
scicap 3e-5/0/80/256 3e-5/0/80/256 96
science_qa 1e-5/0/20/128 1e-5/0/20/128 512
screen2words 1e-5/0/10/256 1e-5/0/10/256 24
stvqa 1e-5/1e-6/3/32 1e-5/1e-6/3/32 48
tallyqa_simple 1e-5/0/2/256 1e-5/0/2/256 32
textcaps 1e-5/1e-6/5/256 1e-5/1e-6/5/256 32
textvqa 3e-6/0/5/256 3e-6/3e-7/10/256 32
vizwizvqa 1e-5/0/10/256 1e-5/0/10/256 48
vqav2 1e-5/1e-6/10/256 1e-5/1e-6/10/256 32
widgetcap 3e-6/3e-7/4/64 3e-6/3e-7/4/64 32
activitynet_cap 1e-5/1e-6/1/128 1e-5/1e-6/1/128 64
msrvtt_cap 1e-5/0/20/128 1e-5/0/20/128 32
msrvtt_qa 1e-5/0/1/128 1e-5/0/1/128 64
msvd_qa 3e-6/3e-7/1/128 3e-6/3e-7/1/128 64
vatex 3e-6/3e-7/10/128 3e-6/3e-7/10/128 64
"""


@pytest.mark.parametrize("line", TRANSFERS.split("\n")[1:-1])
def test_transfer_settings(line):
    name, *wanted, length = line.split()
    benchmark = find_benchmark(name)
    for image_size, numbers in zip((224, 448), wanted, strict=True):
        settings = settings_of(benchmark, image_size)
        rate, decay, epochs, batch = map(float, numbers.split("/"))
        assert settings["learning_rate"] == rate
        assert settings["weight_decay"] == decay
        assert settings["epochs"] == epochs
        assert settings["batch_size"] == batch
        assert settings["prompt_length"] == int(length)
    frozen = name in ("msrvtt_cap", "msrvtt_qa", "science_qa")
    assert ("freeze" in settings_of(benchmark, 224)) == frozen
    assert ("freeze" in settings_of(benchmark, 448)) == (
        frozen or name == "gqa"
    )


def test_frames_beams_and_smoothing():
    found = {
        name: (benchmark.frames, benchmark.stride)
        for name, benchmark in benchmarks().items()
        if benchmark.frames
    }
    assert found == {
        "activitynet_cap": (16, 30),
        "activitynet_qa": (16, 70),
        "msrvtt_cap": (16, 9),
        "msrvtt_qa": (16, 9),
        "msvd_qa": (8, 26),
        "vatex": (16, 7),
    }
    beams = {
        n: benchmark.beams
        for n, benchmark in benchmarks().items()
        if benchmark.beams > 1
    }
    assert beams == {"coco_captions": 2, "nocaps": 2, "textcaps": 3}
    smoothed = {
        benchmark.task: benchmark.finetune["label_smoothing"]
        for benchmark in benchmarks().values()
        if "label_smoothing" in benchmark.finetune
    }
    assert smoothed == {
        **{"chartqa": 0.2, "infovqa": 0.4, "refcoco": 0.3, "rsvqa_lr": 0.2},
        **{"scicap": 0.1, "screen2words": 0.2, "stvqa": 0.1, "widgetcap": 0.1},
    }
    lowered = {
        benchmark.task
        for benchmark in benchmarks().values()
        if benchmark.lower_answers
    }
    assert lowered == {"infovqa", "rsvqa_hr", "rsvqa_lr", "stvqa", "textcaps"}
    averaged = {
        name: len(benchmark.languages)
        for name, benchmark in benchmarks().items()
        if benchmark.average_over
    }
    assert averaged == {"coco35l": 34, "marvl": 5, "xm3600": 35, "xgqa": 7}


def test_card_numbers_of_a_model():
    textvqa = find_benchmark("TextVQA")
    assert textvqa.card_numbers("448-3B") == {"acc": 75.2}
    assert textvqa.card_numbers(None) == {}
    assert find_benchmark("vatex").card_numbers("448-3B") == {}
    assert find_benchmark("docci").card_numbers("448-10B")["nes"] == 20.27
    assert find_benchmark("docci").card_numbers("448-28B") == {}


def test_unknown_benchmark_names_the_nearest():
    for typed, near in (("texvqa", "textvqa"), ("refcoco", "refcoco_val")):
        with pytest.raises(
            ValueError, match=rf"{typed}'. The nearest:.*{near}"
        ):
            find_benchmark(typed)
    with pytest.raises(ValueError, match="'zzz'. `keras-paligemma benchmarks`"):
        find_benchmark("zzz")


def call(*arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_command_lists_and_shows():
    lines = call().splitlines()
    assert len(lines) == len(benchmarks())
    shown = r"textvqa +TextVQA \(val\) +vqav2 +val +textvqa"
    assert sum(bool(re.match(shown, line)) for line in lines) == 1
    shown = call("show", "textvqa")
    assert "https://textvqa.org/dataset/" in shown
    assert "448-3B 75.2" in shown
    assert "greedy" in shown
    with pytest.raises(ValueError, match="The nearest: textvqa"):
        call("show", "texvqa")
    with pytest.raises(ValueError, match="Received: 'shw' 'textvqa'"):
        call("shw", "textvqa")


def test_nan_stands_for_the_cards_dash():
    numbers = find_benchmark("vatex").card["cider"]
    assert math.isnan(numbers["448-28B"]) and numbers["224-10B"] == 82.7
    assert isinstance(find_benchmark("vatex"), Benchmark)


def test_page_is_made_of_the_registry():
    made = runpy.run_path(str(DOCS / "make_benchmarks.py"))
    assert made["FILE"].read_text("utf-8") == made["page"]()
    assert {benchmark.kind for benchmark in benchmarks().values()} == set(
        made["TEST_DATA"]
    )
