"""Locks for threads that share one model."""

import collections
import contextlib
import functools
import threading

import keras


class Turns:
    """A fair, reentrant lock for a model's variables.

    `fit` holds it from its first batch to its last and gives way between
    batches. A plain lock would return to the same thread at once, however long
    other threads have waited. Whoever takes it meanwhile, be it a callback of
    `fit`, finds the values of the last step in the variables.

    Example:
        >>> turns = Turns()
        >>> with turns, turns:
        ...     turns.give_way("fit")  # Nobody waits.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting = collections.deque()
        self._owner = None
        self._depth = 0
        self._paused = None
        self._trained = []

    def __enter__(self):
        self._take(1)
        try:
            if self._trained:
                write_back(self._trained[-1])
        except BaseException:
            self._leave(1)
            raise
        return self

    def __exit__(self, *error):
        self._leave(1)

    @contextlib.contextmanager
    def held_by(self, model):
        """Hold the lock while Keras trains or evaluates a model.

        Args:
            model: `PaliGemmaCausalLM`.
        """
        with self:
            self._trained.append(model)
            try:
                yield
            finally:
                self._trained.pop()
                # If `evaluate` raises, Keras leaves variables without values.
                write_back(model)

    def wanted(self):
        """Return whether another thread waits."""
        return bool(self._waiting)

    def give_way(self, name):
        """Release the lock to the waiting threads, then take it again.

        Args:
            name: str, the method that pauses, for the error of `check_idle`.
        """
        depth = self._depth
        self._paused = name
        self._leave(depth)
        try:
            self._take(depth)
        except BaseException:  # The lock must be held after an interrupt too.
            self._take(depth)
            raise
        finally:
            self._paused = None

    def check_idle(self, name):
        """Raise a `ValueError` if a method of another thread is paused.

        Args:
            name: str, the method that is about to change the model.
        """
        if self._paused is not None:
            raise ValueError(
                f"`{self._paused}` runs in another thread and goes on with "
                f"this model. Received: `{name}` in between. Expected: "
                f"`generate`, or `adapters.using(name)` around it; all else "
                f"after `{self._paused}` has returned."
            )

    def _take(self, depth):
        thread = threading.get_ident()
        with self._changed:
            if self._owner != thread:
                ticket = object()
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(
                        lambda: (
                            self._owner is None and self._waiting[0] is ticket
                        )
                    )
                    self._owner = thread
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
            self._depth += depth

    def _leave(self, depth):
        with self._changed:
            self._depth -= depth
            if not self._depth:
                self._owner = None
                self._changed.notify_all()


def alone(method):
    """Decorate a method to run only while no other thread uses the model.

    Args:
        method: method of an object whose `turns` is a `Turns`.
    """

    @functools.wraps(method)
    def in_turn(self, *args, **kwargs):
        with self.turns as turns:
            turns.check_idle(method.__name__)
            return method(self, *args, **kwargs)

    return in_turn


def write_back(model):
    """Assign the values that JAX's trainer holds to a model's variables."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
