"""Pass a client's request to the model's thread, and the answer back."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from keras_paligemma.serve.batching import Batches
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
        codec: `MaskCodec` of the model's masks.
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

    async def ask(self, picture, prompt, choice, copies=1, streams=False):
        """Decode a picture and queue a prompt about it.

        Args:
            picture: function that returns bytes; called in another thread.
            prompt: str.
            choice: `Choice`.
            copies: int, number of answers.
            streams: bool.

        Returns:
            list of `Waiting`, one per copy.
        """

        loop = asyncio.get_running_loop()

        def read():
            inputs = self.model.read(picture(), prompt, choice, self.limits)
            requests = [
                Request(inputs, with_seed(choice, number), streams)
                for number in range(copies)
            ]
            return self.batches.put(requests, loop)

        return await loop.run_in_executor(self.readers, read)


async def answers_of(waiting, receive):
    """Wait for answers while the client is connected.

    Args:
        waiting: list of `Waiting`.
        receive: ASGI's `receive`; the body has been read.

    Returns:
        list of `Answered`.

    Raises:
        Disconnected: if the client has gone; its requests are cancelled.
    """
    answers = asyncio.gather(*[request.answer() for request in waiting])
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([answers, gone], return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            return answers.result()
        raise Disconnected
    finally:
        for request in waiting:
            request.left = True
        for task in (answers, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


async def events_of(waiting):
    """Yield (index, piece or `Answered`) of all copies as they arrive.

    Raises:
        Exception: whatever the model raised.
    """
    merged = asyncio.Queue()

    async def pass_on(index, one):
        while True:
            event = await one.events.get()
            merged.put_nowait((index, event))
            if not isinstance(event, str):
                return

    tasks = [
        asyncio.ensure_future(pass_on(*pair)) for pair in enumerate(waiting)
    ]
    left = len(waiting)
    try:
        while left:
            index, event = await merged.get()
            if isinstance(event, BaseException):
                raise event
            left -= not isinstance(event, str)
            yield index, event
    finally:
        for request in waiting:
            request.left = True
        for task in tasks:
            task.cancel()
