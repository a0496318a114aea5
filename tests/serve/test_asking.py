"""The wait for answers: their order, errors, and clients that leave."""

import asyncio

import pytest

from keras_paligemma.serve.asking import answers_of
from keras_paligemma.serve.batching import Reply
from keras_paligemma.serve.limits import Disconnected
from keras_paligemma.serve.requests import Refused

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
    assert all(reply.left for reply in replies)


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
