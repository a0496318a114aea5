"""Batches: one order for all workers and hosts, with no example lost."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_paligemma.data import Batches
from keras_paligemma.data import ExampleError
from keras_paligemma.data import pipeline
from keras_paligemma.data.reader import _shuffled


class Numbers:
    """Examples 0, 1, 2 … whose answers are their numbers; some are invalid."""

    def __init__(self, count, bad=(), answers=1):
        self.count, self.bad, self.answers = count, bad, answers

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"bad {index}")
        answers = [str(index + 1000 * i) for i in range(self.answers)]
        return {"images": index, "prompts": "p", "responses": answers}


def preprocessor(example):
    x = {"number": np.array([example["images"] + 1])}
    return x, np.array([int(example["responses"])]), np.ones(1, "float32")


def take(batches, count=None):
    """Return the answers of the next batches, with -1 for blank rows."""
    rows = []
    for x, y, weights in itertools.islice(batches, count):
        assert ((x["number"] == 0) == (weights == 0)).all()
        rows.append(np.where(weights, y, -1)[:, 0].tolist())
    return rows


def make(count=10, size=3, bad=(), answers=1, **kwargs):
    return Batches(Numbers(count, bad, answers), preprocessor, size, **kwargs)


def test_order_is_a_function_of_seed_and_epoch():
    batches = make(seed=5)
    assert len(batches) == 3
    first = take(batches, 9)
    assert take(batches, 9) == first == take(make(seed=5), 9)
    assert take(make(seed=6), 9) != first
    epochs = [sum(first[i : i + 3], []) for i in (0, 3, 6)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(len(set(epoch)) == 9 and max(epoch) < 10 for epoch in epochs)
    # The second epoch of seed 4 differs from the first epoch of seed 5.
    assert take(make(seed=4), 6)[3:] != first[:3]


def test_without_shuffling_and_with_an_end():
    batches = make(shuffle=False, epochs=2)
    assert take(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] * 2
    batches = make(shuffle=False, epochs=1, drop_remainder=False)
    assert len(batches) == 4
    assert take(batches)[-1] == [9, -1, -1]
    assert take(make(2, 3, epochs=1, shuffle=False, drop_remainder=False)) == [
        [0, 1, -1]
    ]


def test_hosts_share_nothing_and_are_one_host_together():
    hosts = [
        make(11, 2, shard=(i, 2), seed=3, epochs=2, drop_remainder=False)
        for i in range(2)
    ]
    parts = [take(host) for host in hosts]
    alone = take(make(11, 4, seed=3, epochs=2, drop_remainder=False))
    assert [a + b for a, b in zip(*parts, strict=True)] == alone
    first = sum(alone[:3], [])
    assert sorted(first) == [-1, *range(11)]
    assert hosts[0].get_state(2) == hosts[1].get_state(2)
    # The remainder is dropped: both hosts have equally many examples, and none
    # is repeated.
    parts = [take(make(11, 2, shard=(i, 2), epochs=1)) for i in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert len(set(sum(parts[0] + parts[1], []))) == 8


def test_answers_are_drawn_anew_each_epoch():
    rows = take(make(8, 8, answers=4, shuffle=False), 6)
    assert rows == take(make(8, 8, answers=4, shuffle=False), 6)
    assert [np.mod(row, 1000).tolist() for row in rows] == [list(range(8))] * 6
    drawn = np.array(rows) // 1000
    assert set(drawn.ravel()) == {0, 1, 2, 3}
    assert (drawn != drawn[0]).any(axis=0).all()
    # A host draws the same answers as a single host would.
    half = take(make(8, 4, answers=4, shuffle=False, shard=(1, 2)), 6)
    assert half == [row[4:] for row in rows]


def test_resume_is_exact():
    with pytest.warns(UserWarning, match="skipped so far: 1. .*example 4: bad"):
        wanted = take(make(seed=1, bad=(4,), skip_errors=True), 12)
        batches = make(seed=1, bad=(4,), skip_errors=True)
        for count in range(0, 12, 2):
            iterator = iter(batches)
            take(iterator, count)
            state = json.loads(json.dumps(iterator.get_state()))
            assert state == batches.get_state(count)
            fresh = make(seed=1, bad=(4,), skip_errors=True)
            fresh.set_state(state)
            assert take(fresh, 12 - count) == wanted[count:]
            # Going backwards works too. The batch has no blank row, so that the
            # count stays below the next warning.
            clean = next(i for i in range(12) if -1 not in wanted[i])
            iterator.set_state(batches.get_state(clean))
            assert take(iterator, 1) == [wanted[clean]]
    # Batches used in training count from the restored position.
    fresh.set_state(batches.get_state(5))
    assert fresh.get_state(3) == batches.get_state(8)
    ended = make(epochs=1)
    for consumed in (3, 5):
        ended.set_state(make(epochs=1).get_state(consumed))
        assert take(ended) == [] and ended.total == 0


def test_workers_change_nothing():
    changes = {"count": 23, "seed": 2, "bad": (3, 8), "skip_errors": True}
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        alone = make(**changes)
        wanted = take(alone, 16)
        several = make(workers=2, **changes)
        iterator = iter(several)
        assert take(iterator, 9) == wanted[:9]
        # Examples that workers have only prefetched are not counted.
        assert several.skipped == sum(row.count(-1) for row in wanted[:9])
        state = iterator.get_state()
        iterator.close()
        alone.set_state(state)
        assert take(alone, 7) == wanted[9:]


def test_workers_do_not_outlive_a_killed_run():
    run = (
        "import os, signal; from tests.data.test_pipeline import make;"
        "batches = iter(make(workers=2)); next(batches); print('read');"
        "os.sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    # Workers inherit stdout, so it ends when all of them have exited.
    done = subprocess.run(
        [sys.executable, "-c", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL and done.stdout == b"read\n"


def test_errors_from_workers():
    iterator = iter(make(bad=range(10), skip_errors=True, workers=1))
    for _ in range(2):
        with pytest.raises(ValueError, match="None of the 10 .*example 0: bad"):
            next(iterator)
        iterator._batches.workers = 0


def test_errors_stop_and_go_on_stopping():
    iterator = iter(make(bad=(4,), shuffle=False))
    assert take(iterator, 1) == [[0, 1, 2]]
    for _ in range(2):
        with pytest.raises(ExampleError, match="example 4: bad 4 .*skip_err"):
            next(iterator)
    assert iterator.get_state()["batches"] == 1


def test_skipped_examples_are_blank_and_counted():
    batches = make(40, 4, bad=range(5, 25), shuffle=False, skip_errors=True)
    with pytest.warns(UserWarning) as warned:
        rows = take(batches, 10)
    assert sum(rows, []) == [
        -1 if 5 <= number < 25 else number for number in range(40)
    ]
    assert batches.skipped == 20
    assert batches.problems == {
        number: f"example {number}: bad {number}" for number in range(5, 25)
    }
    counts = [str(warning.message).split(".")[0][-2:] for warning in warned]
    assert counts == [" 1", "10"]


def test_a_number_of_messages_is_kept_and_all_are_counted(monkeypatch):
    monkeypatch.setattr(pipeline, "_MOST_PROBLEMS", 3)
    batches = make(12, 4, bad=range(5, 10), shuffle=False, skip_errors=True)
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        take(batches, 3)
    assert batches.skipped == 5 and [*batches.problems] == [5, 6, 7]


def test_all_examples_bad():
    batches = make(bad=range(10), skip_errors=True)
    with pytest.raises(ValueError, match="None of the 10 .*example 0: bad 0"):
        next(iter(batches))


@pytest.mark.parametrize("count", [1, 2, 9_999, 10_000, 12_345])
def test_every_size_is_shuffled_whole(count):
    first, second = (
        [int(order[i]) for i in range(count)]
        for order in (_shuffled(count, 3, 0), _shuffled(count, 3, 1))
    )
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 2:
        assert np.mean(np.equal(first, second)) < 0.01
        assert np.mean(np.diff(first) == 1) < 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"count": 0}, "empty.*Numbers of length 0"),
        ({"count": 2}, "at least 3 .*Received: 2"),
        ({"count": 5, "shard": (0, 2)}, r"at least 6 \(3 a batch, 2 hosts\)"),
        ({"shard": (2, 2)}, "`shard` must be"),
        ({"shard": (-1, 2)}, "`shard` must be"),
        ({"shard": (0, 0)}, r"`shard\[1\]` must be"),
        ({"size": 0}, "`batch_size` must be"),
        ({"size": True}, "`batch_size` must be"),
        ({"epochs": 0}, "`epochs` must be"),
        ({"workers": -1}, "`workers` must be"),
        ({"seed": 0.5}, "`seed` must be"),
        ({"seed": -1}, "`seed` must be"),
        ({"seed": 2**32}, "`seed` must be an integer of 0 to 4294967295"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_counts_may_be_of_numpy():
    assert len(list(make(5, np.int64(2), epochs=np.int64(1)))) == 2


def test_preprocessors_and_sources_of_another_kind():
    batches = Batches(Numbers(3), lambda example: example, 1)
    with pytest.raises(ExampleError, match="no training example.*dict"):
        next(iter(batches))
    batches = Batches([{"images": 0, "prompts": "p"}], preprocessor, 1)
    with pytest.raises(ExampleError, match="example 0: The example lacks"):
        next(iter(batches))


@pytest.mark.parametrize(
    ("first", "second"),
    [(None, "a"), ("a", None), ("a", ["a", "b"]), (["a", "b"], "a")],
)
def test_examples_of_a_batch_have_as_many_pictures(first, second):
    """No picture is lost where the first example has none."""

    def with_pictures(example):
        x, y, weights = preprocessor({**example, "images": 0})
        if example["images"] is None:
            return x, y, weights
        return x | {"images": np.ones(np.shape(example["images"]))}, y, weights

    rows = [
        {"images": images, "prompts": "p", "responses": "1"}
        for images in (first, second, first)
    ]
    batches = Batches(rows, with_pictures, 3, shuffle=False)
    with pytest.raises(ExampleError, match="example 1: The example fits no"):
        next(iter(batches))
    batches = Batches(rows, with_pictures, 3, shuffle=False, skip_errors=True)
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        assert take(batches, 1) == [[1, -1, 1]]


@pytest.mark.parametrize(
    "changes",
    [{"seed": 8}, {"count": 12}, {"size": 2}, {"shuffle": False}],
)
def test_states_of_other_batches_are_refused(changes):
    with pytest.raises(ValueError, match="belongs to other batches"):
        make().set_state(make(**changes).get_state(1))
    with pytest.raises(ValueError, match="belongs to other batches"):
        make().set_state({"step": 3})


def test_grain_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(ValueError, match=r"keras_paligemma\[data\]"):
        make()
