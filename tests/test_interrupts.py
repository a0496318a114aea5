"""Ctrl-C while a model trains or is evaluated."""

import signal
import sys
import threading

import keras
import pytest

from keras_paligemma.interrupts import kept_interrupts


@pytest.fixture(autouse=True)
def ctrl_c():
    """Handle interrupts as Python does; pytest's workers ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Counts(keras.callbacks.Callback):
    """Counts the batches that ended; Keras waits for the loss of each."""

    ended = 0

    def on_train_batch_end(self, batch, logs=None):
        self.ended += 1

    on_test_batch_end = on_train_batch_end


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_training_ends(tiny_model, examples, monkeypatch, method):
    """Keras drops what is raised while it waits for the loss."""
    model, counts = tiny_model(), Counts()
    model.compile(loss="auto")
    convert = keras.src.backend.convert_to_numpy

    def press(value):
        if sys._getframe(1).f_code.co_name == "pythonify_logs":
            signal.raise_signal(signal.SIGINT)
        return convert(value)

    monkeypatch.setattr(keras.src.backend, "convert_to_numpy", press)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        getattr(model, method)(
            examples, batch_size=1, callbacks=[counts], verbose=0
        )
    assert counts.ended == 1
    assert signal.getsignal(signal.SIGINT) is before


def pythonify_logs():
    """Drop what is raised, as Keras's function of this name does."""
    try:
        signal.raise_signal(signal.SIGINT)
    except:  # noqa: E722
        pass


def test_at_the_end_and_once():
    with pytest.raises(KeyboardInterrupt):
        with kept_interrupts() as check:
            check()
            pythonify_logs()
    with kept_interrupts() as check:
        check()


def test_a_handler_that_raises_nothing_is_the_users():
    """Such as one that lets the epoch end first."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda *given: seen.append(given))
    try:
        with kept_interrupts() as check:
            pythonify_logs()
            check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 1


def test_a_callback_may_end_by_an_interrupt_and_the_training_go_on():
    with kept_interrupts() as check:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        check()


def test_other_threads_get_no_signals():
    raised = []

    def run():
        with kept_interrupts() as check:
            check()
        raised.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert raised == [None]
