"""One model in several threads: each answer uses one state of the weights."""

import threading
import time

import keras
import numpy as np
import pytest

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.turns import Turns
from tests.helpers.tiny_models import randomize_adapters

QUESTION = {
    "images": np.full((4, 9, 3), 80, "uint8"),
    "prompts": "caption en",
}


@pytest.fixture
def two_adapters(random_preset):
    """Return a model with adapters "one" and "two", and the answers of each."""
    model = PaliGemmaCausalLM.from_preset(random_preset)
    answers = {}
    for seed, name in enumerate(("one", "two")):
        model.backbone.enable_lora(2, name=name)
        randomize_adapters(model.backbone, seed)
        answers[name] = model.generate(QUESTION)
    assert answers["one"] != answers["two"]
    return model, answers


def in_threads(*functions):
    """Run functions in threads; return each one's exception, or `None`."""
    raised = [None] * len(functions)

    def keep(number):
        try:
            functions[number]()
        except BaseException as error:
            raised[number] = error

    threads = [
        threading.Thread(target=keep, args=(number,))
        for number in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_whoever_waits_is_next():
    turns, order = Turns(), []
    waiting = threading.Barrier(2)

    def give_way():
        with turns, turns:
            waiting.wait()
            while not turns.wanted():
                time.sleep(0.001)
            turns.give_way("fit")
            order.append("after")
            turns.give_way("fit")

    def come_in():
        waiting.wait()
        with turns:
            order.append("between")
            with pytest.raises(ValueError, match="`fit` runs in another"):
                turns.check_idle("merge")

    assert in_threads(give_way, come_in) == [None, None]
    assert order == ["between", "after"]
    turns.check_idle("merge")


def test_answers_between_the_steps_of_a_fit(two_adapters, examples):
    model, answers = two_adapters
    model.compile(keras.optimizers.SGD(0.0))
    done = threading.Event()
    started = threading.Event()
    steps = []

    def step(batch, logs):
        steps.append(batch)
        started.set()
        if done.is_set():
            model.stop_training = True

    def train():
        model.fit(
            examples,
            batch_size=2,
            epochs=10**6,
            validation_data=examples,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=step)],
        )

    def answer():
        started.wait()
        try:
            for _ in range(3):
                assert model.generate(QUESTION) == answers["two"]
                with model.adapters.using("one"):
                    assert model.generate(QUESTION) == answers["one"]
            for change in (
                lambda: model.adapters.select("one"),
                lambda: model.enable_lora(2, name="three"),
                lambda: model.freeze("*"),
                lambda: model.evaluate(examples),
                lambda: model.train_on_batch(examples),
                lambda: model.test_on_batch(examples),
                model.compile,
            ):
                with pytest.raises(ValueError, match="runs in another thread"):
                    change()
        finally:
            done.set()

    assert in_threads(train, answer) == [None, None]
    # Meanwhile training continued with the adapter it began with.
    assert len(steps) > 3
    assert model.adapters.active == "two"
    assert model.generate(QUESTION) == answers["two"]


def test_switching_at_the_same_time(two_adapters):
    model, answers = two_adapters

    def answer(name):
        for _ in range(4):
            with model.adapters.using(name):
                assert model.generate(QUESTION) == answers[name]

    def switch(name):
        for _ in range(20):
            model.adapters.select(name)
            assert model.generate(QUESTION) in answers.values()

    raised = in_threads(
        *(lambda name=name: answer(name) for name in answers),
        *(lambda name=name: switch(name) for name in answers),
    )
    assert raised == [None] * 4
    for name in answers:
        model.adapters.select(name)
        assert model.generate(QUESTION) == answers[name]


def test_a_switch_that_fails_changes_nothing(two_adapters, monkeypatch):
    model, answers = two_adapters
    adapters = model.adapters
    variables, calls = adapters.variables, []
    assign = variables.assign

    def fail_once(values):
        calls.append(values)
        assign(values)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(variables, "assign", fail_once)
    with pytest.raises(KeyboardInterrupt):
        adapters.select("one")
    assert adapters.active == "two"
    assert model.generate(QUESTION) == answers["two"]
    adapters.select("one")
    assert model.generate(QUESTION) == answers["one"]


def test_a_failed_evaluation_leaves_the_weights(tiny_model, examples):
    model = tiny_model()
    before = model.generate(QUESTION)

    class Fail(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.evaluate(examples, batch_size=2, callbacks=[Fail()], verbose=0)
    assert model.generate(QUESTION) == before


def test_a_callback_finds_the_values_of_its_step(
    tiny_model, examples, tmp_path
):
    # On JAX, Keras keeps the values of a step apart from the variables.
    model = tiny_model()
    bare = model.generate(QUESTION)
    model.enable_lora(2)
    model.compile(Adam(5e-2))
    answers, saved = [], []

    def look(batch, logs):
        with model.adapters.using(None):
            answers.append(model.generate(QUESTION))
        saved.append(tmp_path / str(batch))
        model.save_adapter(saved[-1])
        model.save_to_preset(tmp_path / f"preset{batch}")

    model.fit(
        examples,
        batch_size=2,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=look)],
    )
    assert len(answers) > 1 and {*answers} == {bare}
    written = [model.adapters.values("default")]
    for number, folder in enumerate(saved[-2:]):
        model.load_adapter(folder, name=f"saved{number}")
        written.append(model.adapters.values(f"saved{number}"))
    last, before, same = written
    changed = [name for name in last if (last[name] != before[name]).any()]
    assert any(name.endswith("adapter_b") for name in changed)
    for name, array in last.items():
        np.testing.assert_array_equal(same[name], array)
