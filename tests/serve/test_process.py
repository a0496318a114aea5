"""The server process: behaviour over sockets, and shutdown."""

import base64
import contextlib
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn

from keras_paligemma.serve.protocol import protocol
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture

# Requests with "hold" are answered when the standard input is closed.
SERVER = """
import sys
import time
from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.running import run
from tests.serve.plain_model import PlainModel

class Model(PlainModel):
    def answer(self, requests, tell):
        if requests[0].inputs == "hold":
            sys.stdin.read()
        if requests[0].inputs == "late":
            time.sleep(2)
        return super().answer(requests, tell)

    def warm_ups(self):
        return [["no request"]] * ("fails" in sys.argv), []

seconds, most = (60, 4) if "few" in sys.argv else (1, 1024)
limits = Limits(seconds=seconds, body=1_000_000, connections=most)
run(make_app(Model(largest=1), "plain", limits=limits), "127.0.0.1", 0, limits)
"""
IMAGE = base64.b64encode(encode(picture(), "PNG")).decode()


@contextlib.contextmanager
def process(*arguments, code=SERVER):
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield server, int(server.stdout.readline().rpartition(":")[2])
        finally:
            server.kill()


@pytest.fixture(scope="module")
def port():
    with process() as (_, port):
        yield port


def send(port, *parts):
    """Send bytes, and return everything received until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        for part in parts:
            link.sendall(part)
        return b"".join(iter(lambda: link.recv(65536), b""))


def post(body=b"{}", path="/answer", **changes):
    """Build a request, whose headers may be wrong."""
    headers = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Connection": "close",
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}\r\n" for name, value in headers.items() if value]
    return f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def body(prompt="caption en", **fields):
    return json.dumps({"image": IMAGE, "prompt": prompt, **fields}).encode()


def chunked(*chunks):
    content = b"".join(
        b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks
    )
    headers = {"Content_Length": None, "Transfer_Encoding": "chunked"}
    return post(**headers, body=content + b"0\r\n\r\n")


def trailing(size):
    """Build a request in chunks whose last one never ends."""
    headers = {"Content_Length": None, "Transfer_Encoding": "chunked"}
    trailers = b"x: yyyyyyyyyyyyyyyyyy\r\n" * (size // 23)
    return post(**headers, body=b"1\r\n{\r\n0\r\n" + trailers)


MIB = b" " * 2**20
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
BAD = {
    "a length of 5,000 digits": (post(Content_Length="9" * 5000), 400),
    "a length below zero": (post(Content_Length="-1"), 400),
    "100 MB that come": (post(MIB * 95), 413),
    "100 MB that do not come": (post(Content_Length="100000000"), 413),
    "100 MB in chunks": (chunked(*[MIB] * 95), 413),
    "chunks of no length": (
        post(b"zz\r\n", Content_Length=None, Transfer_Encoding="chunked"),
        400,
    ),
    "a body that does not come": (post(Content_Length="50"), 408),
    "a compressed body": (
        post(gzip.compress(body()), Content_Encoding="gzip"),
        415,
    ),
    "deep JSON": (post(b"[" * 500_000), 400),
    "HTTP/9": (b"GET / HTTP/9\r\n\r\n", 400),
    "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: another\r\n\r\n", 400),
    "two lengths": (post(content_length="2"), 400),
    "a length and chunks": (post(Transfer_Encoding="chunked"), 400),
    "a proxy's request": (b"CONNECT localhost:80 HTTP/1.1\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "no HTTP": (b"\x00\xff nonsense\r\n\r\n", 400),
    "a header of 4 MB": (post(X="x" * 4_000_000), 400),
    "trailers of 4 MB": (trailing(4_000_000), 400),
    "what is good": (post(body()), 200),
    "what is good, in chunks": (chunked(body()[:9], body()[9:]), 200),
    # Java's client asks for HTTP/2 so, and sends the body.
    "what is good, and an upgrade": (
        post(body(), Connection="Upgrade, close", Upgrade="h2c"),
        200,
    ),
}


def test_each_request_gets_its_status(port):
    with ThreadPoolExecutor(4) as threads:
        replies = threads.map(lambda one: send(port, one[0]), BAD.values())
        found = dict(zip(BAD, replies, strict=True))
    statuses = {name: int(reply.split()[1]) for name, reply in found.items()}
    assert statuses == {name: status for name, (_, status) in BAD.items()}
    assert not [value for value in found.values() if b"Traceback" in value]


def test_what_comes_before_bad_bytes_is_answered(port):
    names = [b"first", b"second"]
    good = [post(body(n.decode()), Connection="keep-alive") for n in names]
    for count in (1, 2):
        sent = b"".join([*good[:count], b"nonsense\r\n\r\n"])
        *replies, last = send(port, sent).split(b"HTTP/1.1 ")[1:]
        for name, reply in zip(names[:count], replies, strict=True):
            assert reply.startswith(b"200") and name in reply
        assert last.startswith(b"400")


def test_a_request_behind_another_may_take_longer_than_the_limit(port):
    """The limit of a second is for clients, not for answers."""
    sent = [
        post(body(prompt), Connection=connection)
        for prompt, connection in (("first", "keep-alive"), ("late", "close"))
    ]
    replies = send(port, b"".join(sent)).split(b"HTTP/1.1 ")[1:]
    assert [reply[:3] for reply in replies] == [b"200", b"200"]
    assert b"late" in replies[1]


def test_many_requests_that_would_change_the_protocol(port):
    """Each is parsed again, and none as deep as those before it."""
    ask = GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    replies = send(port, ask * 1500 + GET + b"Connection: close\r\n\r\n")
    assert replies.count(b"HTTP/1.1 200") == 1501


def test_a_server_ends_though_a_client_does_not_read():
    """Closing a connection waits for what is unread, even if it is little."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"a" * 50_000})

    config = uvicorn.Config(app, http=protocol(1), lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as listening, socket.socket() as link:
        # Small buffers of the system leave bytes to the server's own.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, daemon=True
        )
        thread.start()
        link.connect(listening.getsockname())
        link.sendall(GET + b"\r\n")
        assert link.recv(8) == b"HTTP/1.1"
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def test_who_sends_nothing_is_let_go(port):
    with ThreadPoolExecutor(4) as threads:
        silent = threads.submit(send, port)
        slow = threads.submit(send, port, b"GET / HT")
        # The second request of the connection is also slow.
        second = threads.submit(send, port, GET + b"\r\n", b"GET / HT")
    assert silent.result() == slow.result() == b""
    assert second.result().count(b"HTTP/1.1") == 1


def test_who_does_not_read_is_disconnected(port):
    ask = (GET + b"\r\n").replace(b"/healthz", b"/openapi.json") * 10
    with socket.socket() as link, pytest.raises(ConnectionError):
        # A small buffer is full soon.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(30)
        link.connect(("127.0.0.1", port))
        while True:
            link.sendall(ask)


def test_who_hangs_up_stops_nothing(port):
    for data in (post(body()), post(body())[:99], post(body(stream=True))):
        with socket.create_connection(("127.0.0.1", port)) as link:
            link.sendall(data)
    assert b" 200 " in send(port, post(body()))[:20]


def metric(port, name):
    reply = send(port, b"GET /metrics HTTP/1.0\r\n\r\n").decode()
    return float(re.search(f"^keras_paligemma_{name} (.*)$", reply, re.M)[1])


def refuses(port):
    try:
        send(port, GET + b"Connection: close\r\n\r\n")
    except OSError:
        return True
    return False


def test_what_was_accepted_is_answered_after_sigterm():
    def ask(prompt):
        return send(port, post(body(prompt, stream=prompt > "d")))

    prompts = ["hold", *"abcdef"]
    with process() as (server, port), ThreadPoolExecutor(7) as threads:
        replies = [threads.submit(ask, prompts[0])]
        while metric(port, "batch_size_count") < 1:
            time.sleep(0.02)
        replies += [threads.submit(ask, prompt) for prompt in prompts[1:]]
        while metric(port, "queue") < 6:
            time.sleep(0.02)
        server.send_signal(signal.SIGTERM)
        while not refuses(port):
            time.sleep(0.02)
        server.stdin.close()
        texts = [reply.result().decode() for reply in replies]
        assert server.wait(30) in (0, -signal.SIGTERM)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.startswith("HTTP/1.1 200")
        assert f'"text":"{prompt}"' in text.replace(": ", ":")


def status(port, data):
    return int(send(port, data).split()[1])


def test_more_connections_than_allowed_are_refused():
    check = GET + b"Connection: close\r\n\r\n"
    with process("few") as (_, port), contextlib.ExitStack() as idle:
        assert status(port, check) == 200
        for _ in range(3):
            link = socket.create_connection(("127.0.0.1", port))
            idle.enter_context(link)
        assert status(port, check) == 503
        idle.close()
        # The server must first notice that the connections were closed.
        while status(port, check) == 503:
            time.sleep(0.02)
        assert status(port, check) == 200


def test_a_server_whose_model_fails_ends():
    with process("fails") as (server, _):
        _, log = server.communicate(timeout=30)
    assert server.returncode == 1
    assert "could not be warmed up" in log
    assert "AttributeError" in log
