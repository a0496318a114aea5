"""Batch the requests that are waiting at the same time."""

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from dataclasses import field

from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.requests import Request

log = logging.getLogger("keras_paligemma.serve")


@dataclass(eq=False)
class Waiting:
    """A request in the queue, and the channel for its answer.

    Args:
        request: `Request`.
        loop: the event loop of its client.
        since: float, seconds of `time.monotonic`.
        events: `asyncio.Queue` of str, pieces of text, and at the end an
            `Answered` or an exception.
        left: bool, whether the client has gone.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    since: float = field(default_factory=time.monotonic)
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: bool = False

    def tell(self, event):
        """Send an event to the client, from the model's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def answer(self):
        """Wait for the `Answered`; pieces of text are skipped."""
        while True:
            event = await self.events.get()
            if isinstance(event, BaseException):
                raise event
            if not isinstance(event, str):
                return event


class Batches:
    """A queue of requests, and the thread that runs the model.

    A batch is the oldest request and the later ones that can share a batch
    with it. It runs when it is full, or when the oldest has waited long
    enough. While it is computed the next one fills up.

    Args:
        model: `PresetModel` or `SavedModel`.
        largest: int, requests per batch, a power of two.
        milliseconds: float, how long a request waits for a batch to fill.
        room: int, size of the queue; requests beyond it are refused.
        metrics: `Metrics`.
    """

    def __init__(self, model, largest, milliseconds, room, metrics):
        self.model = model
        self.largest = largest
        self.seconds = milliseconds / 1000
        self.room = room
        self.metrics = metrics
        self.ready = threading.Event()
        self.stopping = False
        self._queue = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model")
        metrics.queue.set_function(lambda: len(self._queue))

    def start(self):
        """Start the model's thread, which warms up before it answers."""
        self._thread.start()

    def stop(self):
        """Answer the queued requests and end the thread."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()
        self._thread.join()

    def put(self, requests):
        """Queue all of the requests or none.

        Args:
            requests: list of `Request`.

        Returns:
            List of `Waiting`.

        Raises:
            Refused: if the queue is full, or the server is stopping.
        """
        loop = asyncio.get_running_loop()
        waiting = [Waiting(request, loop) for request in requests]
        with self._changed:
            if self.stopping:
                raise Refused(503, "The server stops.")
            if len(self._queue) + len(waiting) > self.room:
                raise Refused(
                    429,
                    f"{len(self._queue)} requests wait already. Try again.",
                    headers={"Retry-After": "1"},
                )
            self._queue.extend(waiting)
            self._changed.notify_all()
        return waiting

    def _run(self):
        try:
            self.model.warm_up(self.largest)
        except Exception:  # noqa: BLE001  what fails will fail when it is asked
            log.exception("warming up failed")
        self.ready.set()
        while batch := self._next():
            self.metrics.batch_size.observe(len(batch))
            try:
                answers = self.model.answer(
                    [one.request for one in batch],
                    lambda row, text, batch=batch: batch[row].tell(text),
                )
            except Exception as error:  # noqa: BLE001  keeps serving
                log.exception("a batch failed")
                answers = [error] * len(batch)
            for one, answer in zip(batch, answers, strict=True):
                self._finish(one, answer)

    def _finish(self, waiting, answer):
        if not isinstance(answer, Exception):
            self.metrics.tokens.inc(len(answer.token_ids))
        try:
            waiting.tell(answer)
        except RuntimeError:
            log.warning("nobody waits for an answer: its loop is closed")

    def _next(self):
        """Wait for a batch and return it; `[]` at the end."""
        with self._changed:
            while True:
                while self._queue and self._queue[0].left:
                    self._queue.popleft()
                if not self._queue and self.stopping:
                    return []
                if not self._queue:
                    self._changed.wait()
                    continue
                batch = self._together()
                rest = self._queue[0].since + self.seconds - time.monotonic()
                if len(batch) == self.largest or rest <= 0 or self.stopping:
                    taken = set(map(id, batch))
                    self._queue = deque(
                        one for one in self._queue if id(one) not in taken
                    )
                    return batch
                self._changed.wait(rest)

    def _together(self):
        """Return the oldest requests that can share a batch."""
        key = self.model.key(self._queue[0].request)
        batch = []
        for one in self._queue:
            if not one.left and self.model.key(one.request) == key:
                batch.append(one)
            if len(batch) == self.largest:
                break
        return batch
