"""Pass a client's request to the model's thread, and the answer back."""

import asyncio
import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from keras_paligemma.serve.batching import Batches
from keras_paligemma.serve.batching import Reply
from keras_paligemma.serve.batching import Waiting
from keras_paligemma.serve.limits import Disconnected
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Request
from keras_paligemma.serve.requests import with_seed


@dataclass(frozen=True)
class Service:
    """The state that all endpoints share.

    Args:
        name: str, the model's name for clients.
        model: `PresetModel` or `SavedModel`.
        batches: `Batches`.
        limits: `Limits`.
        codec: `MaskCodec` of the model's masks, or `None`.
        fetches: bool, whether pictures are fetched from http(s) URLs.
        readers: thread pool that decodes pictures.
    """

    name: str
    model: Any
    batches: Batches
    limits: Limits
    codec: Any
    fetches: bool = False
    readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(4, "picture")
    )

    def ask(self, picture, prompt, choice, copies=1, streams=False):
        """Start to decode a picture, and then queue a prompt about it.

        The event loop is not woken between a request and its answer: on few
        cores its thread would compete with the model's.

        Args:
            picture: function that returns bytes; called in another thread.
            prompt: str.
            choice: `Choice`.
            copies: int, number of answers.
            streams: bool.

        Returns:
            list of `Reply`, one per copy. An error in the picture or the
            prompt is an event of each reply.

        Raises:
            Refused: the queue is full, or closed.
        """
        self.batches.reserve(copies)
        loop = asyncio.get_running_loop()
        replies = [Reply(loop) for _ in range(copies)]

        def read():
            waiting = []
            try:
                # Its client may have left while it waited for a thread.
                if not all(reply.left for reply in replies):
                    inputs = self.model.read(
                        picture(), prompt, choice, self.limits
                    )
                    waiting = [
                        Waiting(
                            Request(inputs, with_seed(choice, number), streams),
                            reply,
                        )
                        for number, reply in enumerate(replies)
                    ]
            except Exception as error:  # noqa: BLE001  raised in the loop
                for reply in replies:
                    reply.tell(error)
            self.batches.put(waiting, copies)

        self.readers.submit(read)
        return replies


async def accepted(replies, receive):
    """Wait until requests of streams are in the queue.

    Args:
        replies: list of `Reply`.
        receive: ASGI's `receive`; the body has been read.

    Raises:
        Disconnected: if the client disconnects; its requests are cancelled.
        Exception: the error of an invalid request.
    """
    with _while_connected(replies, receive):
        for reply in replies:
            event = await reply.events.get()
            if isinstance(event, BaseException):
                raise event


async def answers_of(replies, receive):
    """Wait for answers while the client is connected.

    Args:
        replies: list of `Reply`.
        receive: ASGI's `receive`; the body has been read.

    Returns:
        list of `Answered`.

    Raises:
        Disconnected: if the client disconnects; its requests are cancelled.
        Exception: the error of a reply, when those before it have answered.
    """
    with _while_connected(replies, receive):
        return [await reply.answer() for reply in replies]


@contextlib.contextmanager
def _while_connected(replies, receive):
    """End a wait when the client disconnects; cancel what is not answered."""
    gone = asyncio.ensure_future(_tell_when_gone(receive, replies))
    try:
        yield
    except BaseException:
        for reply in replies:
            reply.left = True
        raise
    finally:
        gone.cancel()


async def _tell_when_gone(receive, replies):
    """End the wait for answers when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for reply in replies:
        reply.events.put_nowait(Disconnected())


async def events_of(replies):
    """Yield (index, piece or `Answered`) of all copies as they arrive.

    Raises:
        Exception: any exception of the model.
    """
    merged = asyncio.Queue()

    async def pass_on(index, reply):
        while True:
            event = await reply.events.get()
            merged.put_nowait((index, event))
            if not isinstance(event, str):
                return

    tasks = [
        asyncio.ensure_future(pass_on(*pair)) for pair in enumerate(replies)
    ]
    left = len(replies)
    try:
        while left:
            index, event = await merged.get()
            if isinstance(event, BaseException):
                raise event
            left -= not isinstance(event, str)
            yield index, event
    finally:
        for reply in replies:
            reply.left = True
        for task in tasks:
            task.cancel()


def event_of(content):
    """Return a server-sent event, str, that carries an object as JSON."""
    return f"data: {json.dumps(content)}\n\n"
