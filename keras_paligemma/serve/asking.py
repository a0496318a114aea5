"""From a client's request to the model's thread and back."""

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
    """What all endpoints share.

    Args:
        name: str, the model's name for clients.
        model: `PresetModel` or `SavedModel`.
        batches: `Batches`.
        limits: `Limits`.
        codec: `MaskCodec` of the model's masks.
        fetches: bool, pictures of http(s) addresses are fetched.
        readers: threads that decode pictures.
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
        """Queue a prompt.

        Args:
            picture: function that gives bytes; called in a thread of its own.
            prompt: str.
            choice: `Choice`.
            copies: int, answers.
            streams: bool.

        Returns:
            List of `Waiting`, one a copy.
        """

        def read():
            return self.model.read(picture(), prompt, choice, self.limits)

        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self.readers, read)
        return self.batches.put(
            [
                Request(inputs, with_seed(choice, number), streams)
                for number in range(copies)
            ]
        )


async def answers_of(waiting, receive):
    """Wait for answers, as long as the client does.

    Args:
        waiting: list of `Waiting`.
        receive: ASGI's function, whose body is read.

    Returns:
        List of `Answered`.

    Raises:
        Disconnected: the client has gone; the model is spared what waits.
    """
    answers = asyncio.gather(*[one.answer() for one in waiting])
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([answers, gone], return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            return answers.result()
        raise Disconnected
    finally:
        for one in waiting:
            one.left = True
        for task in (answers, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


async def events_of(waiting):
    """Give (index, piece or `Answered`) of all copies as they come.

    Raises:
        Exception: what failed.
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
        for one in waiting:
            one.left = True
        for task in tasks:
            task.cancel()
