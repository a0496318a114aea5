"""Means, intervals and the worst rows; metrics computed batch by batch."""

import numpy as np
import pytest

from keras_paligemma import metrics
from tests.helpers.random_answers import captions_for
from tests.helpers.random_answers import objects_for


def test_interval_of_a_mean_is_the_binomials():
    right = np.repeat([1.0, 0.0], [640, 360])
    scores = metrics.Scores({"acc": right})
    low, high = scores.intervals(draws=2000)["acc"]
    error = 1.96 * np.sqrt(0.64 * 0.36 / 1000)
    np.testing.assert_allclose(
        [low, high], [0.64 - error, 0.64 + error], atol=4e-3
    )
    assert scores.intervals(draws=2000)["acc"] == (low, high)


def test_interval_counts_the_rows_of_a_kind():
    part = np.where(np.arange(500) < 50, 1.0, np.nan)
    part[:10] = 0
    scores = metrics.Scores({"all": np.ones(500), "part": part})
    assert scores.values() == {"all": 1.0, "part": 0.8}
    assert scores.counts() == {"all": 500, "part": 50}
    low, high = scores.intervals()["part"]
    assert 0.65 < low < 0.75 < 0.85 < high < 0.95
    assert scores.intervals()["all"] == (1, 1)
    # A third of the draws have no row of the part.
    one = np.where(np.arange(500) == 0, 1.0, np.nan)
    scores = metrics.Scores({"one": one, "none": np.full(500, np.nan)})
    assert scores.intervals()["one"] == (1, 1)
    assert np.isnan(
        [scores.values()["none"], *scores.intervals()["none"]]
    ).all()


def test_worst_rows_come_first():
    scores = metrics.Scores({"acc": np.array([1, 0, np.nan, 0.5, 0])})
    assert scores.worst(3) == [1, 4, 3]
    assert scores.worst(9) == [1, 4, 3, 0]
    scores = metrics.Scores(scores.columns, quality=np.arange(5.0))
    assert scores.worst(2) == [0, 1]
    many = metrics.Scores({"acc": np.arange(200) % 2.0})
    assert many.worst(100) == list(range(0, 200, 2))


@pytest.mark.parametrize("name", ["bleu", "rouge", "vqa", "music"])
def test_streamed_equals_all_at_once(name):
    found, right = captions_for(3, rows=20, least=1)
    if name == "music":
        right = [some[0] for some in right]
    function = getattr(metrics, name)
    streamed = metrics.Streamed(function)
    assert streamed.name == name
    assert streamed.result() == {}
    for first in (0, 7, 14):
        rows = slice(first, first + 7)
        streamed.update_state(found[rows], right[rows])
    whole = function(found, right).values()
    assert streamed.result() == pytest.approx(whole, rel=1e-12)
    streamed.reset_state()
    streamed.update_state(found[:7], right[:7])
    assert streamed.result() == function(found[:7], right[:7]).values()


def test_streamed_value_of_no_row_is_nan():
    def part(texts):
        return metrics.Scores({"part": np.full(len(texts), np.nan)})

    streamed = metrics.Streamed(part)
    streamed.update_state(["a", "b"])
    assert np.isnan(streamed.result()["part"])


def test_streamed_keeps_the_types_of_all_batches():
    streamed = metrics.Streamed(metrics.rsvqa, lower=False)
    rows = (["yes", "no"], [["yes"], ["No"]], ["comp", "presence"])
    for row in range(2):
        streamed.update_state(*[column[row : row + 1] for column in rows])
    assert streamed.result() == metrics.rsvqa(*rows, lower=False).values()
    assert streamed.result()["acc_avg_nonum"] == 0.5


def test_streamed_boxes():
    found, right = objects_for(1)
    streamed = metrics.Streamed(metrics.box_f1, threshold=0.75)
    for row in range(10):
        streamed.update_state(found[row : row + 1], right[row : row + 1])
    whole = metrics.box_f1(found, right, threshold=0.75).values()
    assert streamed.result() == pytest.approx(whole, rel=1e-12)


def test_cider_does_not_stream():
    with pytest.raises(ValueError, match="cider weighs n-grams"):
        metrics.Streamed(metrics.cider)
    with pytest.raises(ValueError, match="orders the objects of all"):
        metrics.Streamed(metrics.mean_average_precision)
