"""The queue of requests, and which thread runs the model."""

import contextlib
import queue
import threading
import time

import pytest

from keras_paligemma.serve.batching import Batches
from keras_paligemma.serve.batching import Reply
from keras_paligemma.serve.batching import Waiting
from keras_paligemma.serve.metrics import Metrics
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request
from tests.serve.plain_model import PlainModel

pytestmark = pytest.mark.any_backend


class Traced(PlainModel):
    """A stand-in that keeps which threads ran it."""

    def __init__(self, held=False, largest=8):
        super().__init__(held, largest)
        self.threads = []

    def answer(self, requests, tell):
        self.threads.append(threading.current_thread().name)
        return super().answer(requests, tell)


@contextlib.contextmanager
def started(model):
    """Yield the batches of a model whose thread waits for requests."""
    batches = Batches(model, 0, 16, Metrics())
    batches.start()
    until(lambda: batches._waits)
    yield batches
    batches.stop()


def until(holds):
    """Wait for at most ten seconds until a function returns True."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)
    assert holds()


class AtOnce:
    """A loop that runs what it is told at once, whatever the thread."""

    def call_soon_threadsafe(self, function, *arguments):
        function(*arguments)


def asked(batches, *prompts, left=False):
    """Put requests, and return a function that waits for their answers."""
    events = [queue.SimpleQueue() for _ in prompts]
    batches.reserve(len(prompts))
    batches.put(
        [
            Waiting(Request(prompt, Choice()), Reply(AtOnce(), of_reply, left))
            for prompt, of_reply in zip(prompts, events, strict=True)
        ],
        len(prompts),
    )

    def wait():
        answers = [of_reply.get(timeout=10) for of_reply in events]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer.text for answer in answers]

    return wait


def test_an_idle_model_runs_in_the_thread_that_asks():
    model = Traced()
    with started(model) as batches:
        for prompt in ("a", "b"):
            assert asked(batches, prompt)() == [prompt]
    assert model.threads == [threading.current_thread().name] * 2


def test_what_comes_meanwhile_is_answered_together():
    model = Traced(held=True)
    with started(model) as batches:
        first = threading.Thread(target=lambda: asked(batches, "a"))
        first.start()
        assert model.begun.wait(10)
        later = [asked(batches, prompt) for prompt in "bcd"]
        model.go.set()
        assert [wait() for wait in later] == [["b"], ["c"], ["d"]]
        first.join()
        until(lambda: batches._waits)
        # The previous batch had several requests: this one waits for others.
        assert asked(batches, "e")() == ["e"]
        until(lambda: batches._waits)
        assert asked(batches, "f")() == ["f"]
    assert model.sizes == [1, 3, 1, 1]
    here = threading.current_thread().name
    assert model.threads == [first.name, "model", "model", here]


def test_more_copies_than_a_batch_holds():
    model = Traced(largest=2)
    with started(model) as batches:
        assert asked(batches, *"abcde")() == [*"abcde"]
    assert model.sizes == [2, 2, 1]


def test_a_failure_is_an_answer_and_the_next_one_is_answered():
    with started(Traced()) as batches:
        with pytest.raises(RuntimeError, match="a secret"):
            asked(batches, "fail")()
        assert asked(batches, "a")() == ["a"]


def test_who_has_left_is_not_answered():
    model = Traced()
    with started(model) as batches:
        asked(batches, "a", left=True)
        until(lambda: not batches._queue)
        assert asked(batches, "b")() == ["b"]
    assert model.sizes == [1]


def test_who_has_left_takes_no_place():
    model = Traced(held=True)
    with started(model) as batches:
        first = threading.Thread(target=lambda: asked(batches, "a"))
        first.start()
        assert model.begun.wait(10)
        asked(batches, *"b" * batches.room, left=True)
        try:
            wait = asked(batches, "c")
        finally:
            model.go.set()
        assert wait() == ["c"]
        first.join()


def test_who_leaves_a_stream_is_told_nothing_more():
    """The model ends what nobody hears."""
    heard = []

    class Streams(Traced):
        def answer(self, requests, tell):
            heard.append(tell(0, "a"))
            return super().answer(requests, tell)

    batches = Batches(Streams(), 0, 1, Metrics())
    for left in (False, True):
        reply = Reply(AtOnce(), queue.SimpleQueue(), left)
        batches._answer([Waiting(Request("b", Choice()), reply)])
    assert heard == [True, False]


def test_a_stop_waits_for_the_thread_that_runs_the_model():
    model = Traced(held=True)
    answers = []
    with started(model) as batches:
        running = threading.Thread(
            target=lambda: answers.append(asked(batches, "a")())
        )
        running.start()
        assert model.begun.wait(10)
        stopping = threading.Thread(target=batches.stop)
        stopping.start()
        until(lambda: batches.closed)
        with pytest.raises(Refused, match="stops"):
            asked(batches, "b")
        assert stopping.is_alive()
        model.go.set()
        stopping.join(10)
        running.join(10)
    assert answers == [["a"]]


def test_programs_are_compiled_when_no_request_comes(monkeypatch):
    """A model that others use is not idle."""
    monkeypatch.setattr("keras_paligemma.serve.batching.QUIET", 0.3)
    model = Traced()
    compiled = Request("compiled", Choice())
    model.warm_ups = lambda: ([], [[compiled]])
    with started(model) as batches:
        end = time.monotonic() + 0.9
        while time.monotonic() < end:
            asked(batches, "a")()
            time.sleep(0.02)
        assert "model" not in model.threads
        until(lambda: "model" in model.threads)
