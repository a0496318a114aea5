"""The wait for answers: their order, errors, and clients that leave."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from keras_paligemma.serve.asking import Service
from keras_paligemma.serve.asking import accepted
from keras_paligemma.serve.asking import answers_of
from keras_paligemma.serve.batching import Batches
from keras_paligemma.serve.batching import Reply
from keras_paligemma.serve.limits import Disconnected
from keras_paligemma.serve.metrics import Metrics
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Refused
from tests.serve.plain_model import PlainModel

pytestmark = pytest.mark.any_backend


async def stays():
    """Receive nothing, as from a client that waits for its answer."""
    await asyncio.Event().wait()


async def leaves():
    """Receive the end of a client's connection."""
    return {"type": "http.disconnect"}


def waited(receive, events):
    """Return what `answers_of` returns or raises, and its replies."""

    async def wait():
        replies = [Reply(asyncio.get_running_loop()) for _ in events]
        for reply, of_reply in zip(replies, events, strict=True):
            for event in of_reply:
                reply.tell(event)
        try:
            async with asyncio.timeout(10):
                return await answers_of(replies, receive), replies
        except (Disconnected, Refused) as error:
            return error, replies

    return asyncio.run(wait())


def test_answers_come_in_the_order_of_the_copies():
    found, replies = waited(stays, [["", "a", 1], [2]])
    assert found == [1, 2]
    assert not any(reply.left for reply in replies)


def test_who_left_before_a_thread_was_free_is_not_read():
    """The client of the second request leaves while the first is read."""

    class Slow(PlainModel):
        asked = ()

        def read(self, picture, prompt, choice, limits, field="image"):
            self.asked += (prompt,)
            self.go.wait()
            return prompt

    async def ask():
        model = Slow(held=True)
        batches = Batches(model, 0, 4, Metrics())
        service = Service(
            "plain",
            model,
            batches,
            Limits(),
            None,
            readers=ThreadPoolExecutor(1),
        )
        batches.start()
        [first], [second] = (
            service.ask(bytes, prompt, Choice()) for prompt in ("a", "b")
        )
        with pytest.raises(Disconnected):
            await accepted([second], leaves)
        # A place in the queue is taken while a picture is read.
        for _ in range(2):
            service.ask(bytes, "c", Choice())
        with pytest.raises(Refused, match="4 requests wait already"):
            service.ask(bytes, "d", Choice())
        model.go.set()
        await first.answer()
        await asyncio.to_thread(service.readers.shutdown)
        await asyncio.to_thread(batches.stop)
        return model.asked

    assert asyncio.run(ask()) == ("a", "c", "c")


def test_who_disconnects_is_not_waited_for():
    found, replies = waited(leaves, [[1], []])
    assert isinstance(found, Disconnected)
    assert all(reply.left for reply in replies)


@pytest.mark.parametrize("answers", [[], [1]])
def test_an_error_of_any_copy_is_raised(answers):
    events = [[answer] for answer in answers]
    found, replies = waited(stays, [*events, [Refused(429, "full")]])
    assert found.status == 429
    assert all(reply.left for reply in replies)
