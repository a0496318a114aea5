"""Batch the requests that are waiting at the same time."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from dataclasses import field

from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request

# Seconds without a request before one more program is compiled. Requests that
# arrive meanwhile wait for the compilation.
QUIET = 1

log = logging.getLogger("keras_paligemma.serve")


@dataclass(eq=False)
class Reply:
    """The channel for the answer to a request.

    Args:
        loop: the event loop of its client.
        events: `asyncio.Queue` of str, pieces of text, and at the end an
            `Answered` or an exception. The first piece of a stream is empty:
            its request is in the queue.
        left: bool, whether the client has disconnected.
    """

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: bool = False

    def tell(self, event):
        """Send an event to the client, from any thread.

        Returns:
            bool, whether it is still connected.
        """
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        return not self.left

    async def answer(self):
        """Wait for the `Answered`; pieces of text are skipped."""
        while True:
            event = await self.events.get()
            if isinstance(event, BaseException):
                raise event
            if not isinstance(event, str):
                return event


@dataclass(eq=False)
class Waiting:
    """A request in the queue.

    Args:
        request: `Request`.
        reply: `Reply`.
        since: float, seconds of `time.monotonic`.
    """

    request: Request
    reply: Reply
    since: float = field(default_factory=time.monotonic)


class Batches:
    """A queue of requests, and the thread that runs the model.

    A batch is the oldest request and the later ones that can share a batch
    with it. The next batch fills up while the current one is computed. A batch
    that is not full waits for more requests only if the previous one had
    several: a single client is answered at once. If the model's thread has
    nothing to do, the thread that queues a request runs the model, since to
    wake another thread takes time.

    If the first programs of a model cannot be compiled, `closed` is set and
    waiting requests are refused.

    Args:
        model: `PresetModel` or `SavedModel`.
        milliseconds: float, maximum time that a request waits for others.
        room: int, maximum number of waiting requests, those included whose
            pictures are read; more are refused.
        metrics: `Metrics`.
    """

    def __init__(self, model, milliseconds, room, metrics):
        self.model = model
        self.seconds = milliseconds / 1000
        self.room = room
        self.metrics = metrics
        self.ready = threading.Event()
        self.failed = threading.Event()
        # The reason why requests are refused, or `None`.
        self.closed = None
        self._several = False
        # Whether the model's thread waits for requests, whether another one
        # runs the model meanwhile, and when that last ended.
        self._waits = False
        self._lent = False
        self._used = -math.inf
        self._queue = deque()
        # Requests that `put` will queue.
        self._reserved = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model")
        metrics.queue.set_function(lambda: len(self._queue))

    def start(self):
        """Start the model's thread, which warms up before it answers."""
        self._thread.start()

    def stop(self):
        """Answer the queued requests and end the thread."""
        with self._changed:
            self.closed = self.closed or "The server stops."
            self._changed.notify_all()
        self._thread.join()

    def reserve(self, count):
        """Take places in the queue, or none, for requests that are read now.

        Args:
            count: int.

        Raises:
            Refused: the queue is full, or closed.
        """
        with self._changed:
            if self.closed:
                raise Refused(503, self.closed)
            waiting = len(self._queue) + self._reserved
            if waiting + count > self.room:
                # Those who have left do not wait.
                self._queue = deque(
                    entry for entry in self._queue if not entry.reply.left
                )
                waiting = len(self._queue) + self._reserved
            if waiting + count > self.room:
                raise Refused(
                    429,
                    f"{waiting} requests wait already. Try again.",
                    headers={"Retry-After": "1"},
                )
            self._reserved += count

    def put(self, waiting, reserved):
        """Queue requests, and answer them if none waited.

        Args:
            waiting: list of `Waiting`, empty if they could not be read.
            reserved: int, the places taken for them.
        """
        with self._changed:
            self._reserved -= reserved
            if self.closed:
                for entry in waiting:
                    entry.reply.tell(Refused(503, self.closed))
                return
            for entry in waiting:
                if entry.request.streams:
                    entry.reply.tell("")
            busy = self._lent or self._queue or self._several
            self._queue.extend(waiting)
            batch = self._together() if self._waits and not busy else []
            if not batch:
                self._changed.notify_all()
                return
            self._take(batch)
            self._lent = True
        try:
            self._answer(batch)
        finally:
            with self._changed:
                self._lent, self._used = False, time.monotonic()
                if self._queue or not self._waits:
                    self._changed.notify_all()

    def _run(self):
        try:
            first, later = self.model.warm_ups()
            for requests in first:
                if not self.closed:
                    self.model.answer(requests, _nobody)
        except Exception:  # noqa: BLE001  whatever a compiler raises
            log.exception("the model could not be warmed up")
            self._fail("The model could not be warmed up.")
            return
        self.ready.set()
        later = deque(later)
        while (batch := self._next(idles=not later)) != []:
            if batch is None:
                self._compile(later.popleft())
            else:
                self._answer(batch)

    def _fail(self, reason):
        self.failed.set()
        with self._changed:
            self.closed = reason
            waiting, self._queue = self._queue, deque()
        for entry in waiting:
            self._finish(entry, Refused(503, reason))

    def _compile(self, requests):
        try:
            self.model.answer(requests, _nobody)
        except Exception:  # noqa: BLE001  its clients get the error
            log.exception("a batch of %d cannot be answered", len(requests))

    def _answer(self, batch):
        self.metrics.batch_size.observe(len(batch))
        try:
            answers = self.model.answer(
                [entry.request for entry in batch],
                lambda row, text: batch[row].reply.tell(text),
            )
        except Exception as error:  # noqa: BLE001  keeps serving
            log.exception("a batch failed")
            answers = [error] * len(batch)
        for entry, answer in zip(batch, answers, strict=True):
            self._finish(entry, answer)

    def _finish(self, waiting, answer):
        if not isinstance(answer, Exception):
            self.metrics.tokens.inc(len(answer.token_ids))
        try:
            waiting.reply.tell(answer)
        except RuntimeError:
            log.warning("nobody waits for an answer: its loop is closed")

    def _next(self, idles):
        """Wait for a batch.

        Args:
            idles: bool, whether there is nothing else to do meanwhile.

        Returns:
            list of `Waiting`; `[]` at the end; `None` if there are no
            requests and `idles` is `False`.
        """
        with self._changed:
            while True:
                if self._lent:
                    self._changed.wait()
                    continue
                batch = self._together()
                if not batch:
                    if self.closed:
                        return []
                    if not self._wait(None if idles else QUIET):
                        return None
                    continue
                rest = self._queue[0].since + self.seconds - time.monotonic()
                waits = self._several and len(batch) < self.model.largest
                if not waits or rest <= 0 or self.closed:
                    self._take(batch)
                    return batch
                self._changed.wait(rest)

    def _wait(self, seconds):
        """Wait for a request; return whether any came within some seconds."""
        self._waits = True
        self._changed.wait(seconds)
        self._waits = False
        used = time.monotonic() - self._used < QUIET
        return seconds is None or used or self._lent or bool(self._queue)

    def _take(self, batch):
        """Remove a batch from the queue."""
        self._several = len(batch) > 1
        taken = set(map(id, batch))
        self._queue = deque(
            entry for entry in self._queue if id(entry) not in taken
        )

    def _together(self):
        """Return the oldest requests that can share a batch.

        Requests before them whose clients have disconnected are dropped.
        """
        while self._queue and self._queue[0].reply.left:
            self._queue.popleft()
        if not self._queue:
            return []
        key = self.model.key(self._queue[0].request)
        batch = []
        for entry in self._queue:
            if not entry.reply.left and self.model.key(entry.request) == key:
                batch.append(entry)
            if len(batch) == self.model.largest:
                break
        return batch


def _nobody(row, text):
    """Ignore the pieces of an answer that is computed only to compile."""
    return True
