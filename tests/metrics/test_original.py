"""Every evaluator gives exactly the original's numbers."""

import json

import numpy as np
import pytest

from keras_paligemma import metrics
from keras_paligemma.metrics import answers
from keras_paligemma.metrics import charts
from keras_paligemma.metrics import choices
from keras_paligemma.metrics import counting
from keras_paligemma.metrics import normalised_answers as vqav2
from keras_paligemma.metrics import remote_sensing
from keras_paligemma.metrics.edits import edit_distance
from keras_paligemma.metrics.edits import plain_edit_distance
from tests.helpers.tiny_models import GOLDEN

CASES = json.loads((GOLDEN / "metrics.json").read_text())


def check(scores, wanted):
    """Check that values, and counts under the original's names, are equal."""
    counts = scores.counts()
    found = scores.values() | {"num": len(scores)}
    found |= {
        name.replace("acc/", "num/"): count
        for name, count in counts.items()
        if name.startswith("acc/")
    }
    assert {name: found[name] for name in wanted} == wanted
    assert set(found) - set(wanted) <= {"acc_any", "anls"}


@pytest.mark.parametrize("case", CASES["vqav2_postprocess"])
def test_vqav2_normalises(case):
    assert vqav2.strip_space(case["text"]) == case["stripped"]
    assert vqav2.normalise(case["stripped"]) == case["out"]


def test_vqav2():
    case = CASES["vqav2"]
    scores = vqav2.vqav2(case["preds"], case["answers"], case["answer_type"])
    assert scores.columns["acc"].tolist() == case["per_example"]
    check(scores, case["result"])
    # Space around an answer is none of it, even where all ten agree.
    assert vqav2.vqav2([" a\n"], [["a"] * 10]).values() == {"acc": 1}


@pytest.mark.parametrize("name", ["vqa_multi", "vqa_single"])
@pytest.mark.parametrize("lower", [False, True])
def test_vqa(name, lower):
    case = CASES[name]
    right = case["answers" if name == "vqa_multi" else "answer"]
    scores = answers.vqa(case["preds"], right, lower)
    check(scores, case["result_lower" if lower else "result"])


def test_anls():
    for case in CASES["anls"]:
        assert answers.anls(case["target"], case["prediction"]) == case["score"]


def test_relaxed_accuracy():
    for case in CASES["relaxed_match"]:
        found = charts.relaxed_match(case["target"], case["prediction"])
        assert found == case["match"], case
    case = CASES["chartqa"]
    scores = charts.relaxed_accuracy(case["preds"], case["answer"])
    check(scores, case["result_lower"])
    for lower in (True, False):
        scores = charts.relaxed_accuracy(["yes"], ["Yes"], lower=lower)
        assert scores.values() == {"acc": lower, "relaxed_acc": lower}


def test_relaxed_accuracy_averages_augmented_and_human():
    kinds = ["human", "augmented", "augmented", "augmented"]
    scores = charts.relaxed_accuracy(["1"] * 4, ["2", "1", "1", "5"], kinds)
    values = scores.values()
    assert values["relaxed_acc/human"] == 0
    assert values["relaxed_acc/augmented"] == 2 / 3
    assert values["relaxed_acc/mean"] == 1 / 3
    assert values["relaxed_acc"] == 0.5


def test_tallyqa():
    case = CASES["tallyqa"]
    scores = counting.tallyqa(case["preds"], case["answer"], case["issimple"])
    check(scores, case["result"])


def test_science_qa():
    case = CASES["science_qa"]
    assert [choices.choice(pred) for pred in case["preds"]] == case["parsed"]
    check(choices.science_qa(case["preds"], case["answer"]), case["result"])


def test_rsvqa():
    case = CASES["rsvqa"]
    scores = remote_sensing.rsvqa(
        case["preds"], case["answers"], case["question_type"]
    )
    check(scores, case["result_lower"])


def test_pope():
    case = CASES["pope"]
    check(answers.yes_or_no(case["preds"], case["answer"]), case["result"])
    # Half of the original's rows are right: which, their mean does not tell.
    scores = answers.yes_or_no(case["preds"], case["answer"])
    assert scores.columns["acc"].tolist() == [1, 0, 0, 1]


def test_edit_distance_needs_no_library():
    pairs = [("", ""), ("a", ""), ("kitten", "sitting"), ("abc", "cab")]
    pairs += [(list("ab\n"), list("b")), ("straße", "strasse")]
    for first, second in pairs:
        fast = edit_distance(first, second)
        assert plain_edit_distance(first, second) == fast
        assert plain_edit_distance(second, first) == fast


def refcoco(predictions, boxes):
    masks = [np.ones((8, 8), bool)] * len(boxes)
    return metrics.refcoco(predictions, boxes, masks, lambda codes: codes)


@pytest.mark.parametrize(
    ("function", "columns", "message"),
    [
        (answers.vqa, [["a"], []], "'predictions': 1, 'answers': 0"),
        (answers.vqa, [[], []], "one or more rows"),
        (answers.vqa, [["a"], [[]]], "Row 0 has no right answer"),
        (answers.vqa, [[None], ["a"]], "row 0 is no text"),
        (vqav2.vqav2, [["a"], [["a"] * 9]], "ten answers"),
        (vqav2.vqav2, [["a"], [["a"] * 10], ["word"]], r"\['word'\]"),
        (remote_sensing.rsvqa, [["a"], [["a"]], ["size"]], r"\['size'\]"),
        (remote_sensing.rsvqa, [["a"], [["a"]], [None]], r"\[None\]"),
        (charts.relaxed_accuracy, [["a"], ["a"], ["Human"]], r"\['Human'\]"),
        (charts.relaxed_accuracy, [["3"], [3]], "Row 0 .*a string. .*: 3"),
        (counting.tallyqa, [["3"], [3]], "Row 0 of 'answers' .*: 3"),
        (choices.science_qa, [["a"], [["a"]]], r"a string. .*: \['a'\]"),
        (answers.yes_or_no, [["yes"], [True]], "Received: True"),
        (answers.vqa, [["3"], [3]], "a string or a list of .*: 3"),
        (answers.vqa, [["3"], [["3", None]]], r"Received: \['3', None\]"),
        (vqav2.vqav2, [["3"], [[3] * 10]], "Row 0 of 'answers' is no text"),
        (metrics.captions, [["a"], [["a", None]]], "'references' is no text"),
        (metrics.captions, [["a"], ["a"]], "no list of references.*: 'a'"),
        (metrics.captions, [["a"], [[]]], r"no list of references.*: \[\]"),
        (metrics.music, [["a"], [5]], "'scores' is no text"),
        (metrics.music, [["a", "a"], ["a", ""]], r"none in the rows \[1\]"),
        (metrics.tables, [["a"], [None]], "'html' is no text"),
        (
            *(metrics.text_detection, [[""], [[]], [[None]], [(9, 9)]]),
            "'texts' is no text",
        ),
        (refcoco, [[""], [(0, 0, 9, 9)]], r"Row 0 .*\(0, 0, 9, 9\)"),
        (refcoco, [[""], [(0, 0.5, 1, 0.1)]], "Row 0 .*y1 <= y2"),
        (refcoco, [[""], [(0, 0, 1)]], "Row 0 has no box"),
    ],
)
def test_bad_columns_are_refused(function, columns, message):
    with pytest.raises(ValueError, match=message):
        function(*columns)


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (answers.yes_or_no, [["yes"], []]),
        (charts.relaxed_accuracy, [["1"], []]),
        (charts.relaxed_accuracy, [["1"] * 2, ["1"] * 2, ["human"]]),
        (choices.science_qa, [["a"], []]),
        (counting.tallyqa, [["1"], []]),
        (counting.tallyqa, [["1"] * 2, ["1"] * 2, [1]]),
        (remote_sensing.rsvqa, [["a"], [], ["comp"]]),
        (remote_sensing.rsvqa, [["a"] * 2, [["a"]] * 2, ["comp"]]),
        (vqav2.vqav2, [["a"] * 2, [["a"] * 10] * 2, ["other"]]),
        (metrics.captions, [["a"], []]),
        (metrics.description_lengths, [[]]),
        (metrics.judged, ["nes", ["a"], [], lambda *_: [1]]),
        (metrics.music, [["a"], []]),
        (metrics.smiles, [["C"], []]),
        (metrics.tables, [["a"], []]),
        (metrics.text_detection, [[""], [], [[]], [(9, 9)]]),
        (refcoco, [[""], [(0, 0, 1, 1)] * 2]),
    ],
)
def test_columns_of_another_length_are_refused(function, columns):
    """NumPy would repeat a column of one row."""
    with pytest.raises(ValueError, match="Expected: columns of one length"):
        function(*columns)


def test_a_row_may_be_of_no_kind():
    kinds = ["human", None, "human"]
    scores = charts.relaxed_accuracy(["1", "1", "1"], ["1", "1", "2"], kinds)
    assert scores.values()["relaxed_acc/human"] == 0.5
    types = ["other", None]
    values = vqav2.vqav2(["a", "b"], [["a"] * 10] * 2, types).values()
    assert values == {"acc": 0.5, "acc/other": 1}
