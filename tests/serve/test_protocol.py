"""Connections without sockets: what ends them, and what does not."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from keras_paligemma.serve.protocol import HEAD
from keras_paligemma.serve.protocol import protocol

pytestmark = pytest.mark.any_backend

SECONDS = 0.05
GET = b"GET /a HTTP/1.1\r\nHost: localhost\r\n"


class Transport:
    """A connection whose client does nothing by itself."""

    def __init__(self):
        self.sent = b""
        self.closing = self.aborted = False
        self.reading = True

    def get_extra_info(self, name, default=None):
        return default

    def write(self, data):
        self.sent += data

    def write_eof(self):
        pass

    def is_closing(self):
        return self.closing

    def close(self):
        self.closing = True

    def abort(self):
        self.closing = self.aborted = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


def connected(talk):
    """Run `talk(connection, transport, replies)` on a connection.

    Each request is answered with its headers when `replies` is released.
    """

    async def run():
        replies = asyncio.Semaphore(0)

        async def app(scope, receive, send):
            await replies.acquire()
            names = b" ".join(name for name, _ in scope["headers"])
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": names})

        config = uvicorn.Config(app, http=protocol(SECONDS), lifespan="off")
        config.load()
        connection = config.http_protocol_class(config, ServerState(), {})
        transport = Transport()
        connection.connection_made(transport)
        await talk(connection, transport, replies)
        connection.connection_lost(None)

    asyncio.run(run())


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_only_who_leaves_a_reply_unread_for_long_is_cut_off():
    async def talk(connection, transport, replies):
        connection.data_received(GET + b"\r\n")
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(3 * SECONDS)
        assert not transport.closing
        connection.pause_writing()
        await until(lambda: transport.aborted)

    connected(talk)


@pytest.mark.parametrize("reason", ["a request", "keep-alive", "shutdown"])
def test_a_connection_that_is_closed_ends(reason):
    """Even if its last bytes stay unread, whatever it was closed for."""

    async def talk(connection, transport, replies):
        last = reason == "a request"
        line = b"Connection: close\r\n\r\n" if last else b"\r\n"
        connection.data_received(GET + line)
        replies.release()
        await until(lambda: b" 200 " in transport.sent)
        await until(lambda: connection.cycle.response_complete)
        if reason == "keep-alive":
            connection.timeout_keep_alive_handler()
        if reason == "shutdown":
            connection.shutdown()
        # At once, not when it would have been idle for too long.
        assert transport.closing and connection.closes is not None
        await until(lambda: transport.aborted)

    connected(talk)


def test_requests_that_wait_for_others_stop_the_reading():
    async def talk(connection, transport, replies):
        connection.data_received((GET + b"\r\n") * 3)
        found = []
        for count in (1, 2, 3):
            replies.release()
            await until(lambda n=count: transport.sent.count(b" 200 ") == n)
            found.append(transport.reading)
        assert found == [False, True, True]

    connected(talk)


def test_headers_are_limited_one_request_at_a_time():
    async def talk(connection, transport, replies):
        long = GET + b"X: " + b"x" * (HEAD // 2) + b"\r\n\r\n"
        post = GET.replace(b"GET", b"POST") + b"Content-Length: 200000\r\n\r\n"

        def send(data):
            for start in range(0, len(data), 10_000):
                connection.data_received(data[start : start + 10_000])

        for data in (long, long, post + b" " * 200_000, long[:-2]):
            send(data)
        for _ in range(3):
            replies.release()
        await until(lambda: transport.sent.count(b" 200 ") == 3)
        send(b"Y: " + b"y" * (HEAD // 2))
        await until(lambda: b" 400 " in transport.sent)
        assert b"Expected: headers of" in transport.sent

    connected(talk)


def test_only_the_header_of_an_upgrade_is_dropped():
    async def talk(connection, transport, replies):
        upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\nX: x\r\n\r\n"
        connection.data_received(GET + upgrade)
        replies.release()
        await until(lambda: b"host connection x" in transport.sent)

    connected(talk)
