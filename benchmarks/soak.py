"""Send valid and invalid requests from 64 clients, and watch the server.

    python benchmarks/soak.py [--preset pali_gemma2_nano_112] [--requests 10000]

Half of the requests are invalid. Each of them must get its own status, and each
valid one the text that it gets on an idle server. Prints failures, the count of
each status, and the server's memory (Linux) at each tenth of the run.
"""

import argparse
import base64
import collections
import contextlib
import gzip
import http.client
import io
import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

CLIENTS = 64
# The server's timeout for a client in seconds, and its limit of a body in
# bytes.
SECONDS, BODY = 10, 2_000_000
PICTURE = Path(__file__).parents[1] / "examples" / "pictures" / "scene_0.png"
MIB = b" " * 2**20
# A client that disconnects before its answer, and a client that the server
# disconnects without a reply.
GONE, LET_GO = "gone", "let go"


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Args:
        parts: iterable of bytes, sent one by one.
        status: int, the expected status; or `GONE` or `LET_GO`.
        pause: float, seconds between parts.
        every: int, the kind is sent in one of this many rounds.
    """

    parts: tuple[bytes, ...]
    status: int | str
    pause: float = 0.0
    every: int = 1


def post(body, path="/answer", **headers):
    """Build a request; a header that is `None` is omitted."""
    lines = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Connection": "close",
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{key}: {line}\r\n" for key, line in lines.items() if line)
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def ask(image, prompt="caption en", **fields):
    """Build the body of a request to /answer."""
    image = base64.b64encode(image).decode()
    return json.dumps({"image": image, "prompt": prompt, **fields}).encode()


def chat(image, **fields):
    """Build a request for OpenAI's API."""
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "caption en"},
    ]
    messages = [{"role": "user", "content": parts}]
    body = json.dumps({"model": "soak", "messages": messages, **fields})
    return post(body.encode(), "/v1/chat/completions")


def chunked(*chunks):
    """Build a chunked request."""
    head = post(b"", Content_Length=None, Transfer_Encoding="chunked")
    body = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
    return head, *body, b"0\r\n\r\n"


def png(width, height, *chunks):
    """Return a PNG's signature, followed by chunks of a name and bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    spelt = [
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(spelt)


def bombs():
    """Return small files that expand to many pixels, frames or much text."""
    zeros = zlib.compress(bytes(300_000_000), 9)
    gif = io.BytesIO()
    Image.new("P", (9000, 9000)).save(gif, "GIF")
    return {
        "pixels of 1.2 GB": (png(20_000, 20_000, (b"IDAT", zeros)), 413),
        "a side of 2³⁰": (png(2**30, 2**30), 413),
        "a GIF of 81 million pixels": (gif.getvalue(), 413),
        "300 MB of text": (
            png(8, 8, (b"zTXt", b"a\0\0" + zeros), (b"IDAT", zeros[:99])),
            400,
        ),
    }


def good_kinds(image):
    """Return the valid kinds of request by name."""
    return {
        "a caption": post(ask(image)),
        "a short one": post(ask(image, max_new_tokens=3)),
        "in chunks": b"".join(chunked(ask(image)[:999], ask(image)[999:])),
        "boxes": post(ask(image, "detect lion")),
        "drawn": post(ask(image, temperature=1.0, top_p=0.9, seed=7)),
        "a stream": post(ask(image, stream=True)),
        "OpenAI's": chat(image, logprobs=True),
    }


def bad_kinds(image):
    """Return the invalid kinds of request by name."""
    whole = ask(image)
    kinds = {
        "no picture": (post(ask(b"hello")), 400),
        "half a picture": (post(ask(image[: len(image) // 2])), 400),
        "no base64": (post(b'{"image": "%", "prompt": "a"}'), 400),
        "a number": (post(b'{"image": 1, "prompt": "a"}'), 400),
        "a long prompt": (post(ask(image, "word " * 400)), 400),
        "OpenAI's, no such model": (chat(image, model="other"), 404),
        "OpenAI's, too hot": (chat(image, temperature=9), 400),
        "deep lists": (post(b"[" * 500_000), 400),
        "deep objects": (post(b'{"a":' * 100_000), 400),
        "half of JSON": (post(whole[:500]), 400),
        "text": (post(whole, Content_Type="text/plain"), 415),
        "a compressed body": (
            post(gzip.compress(MIB * 100), Content_Encoding="gzip"),
            415,
        ),
        "another site's page": (post(whole, Origin="https://a.example"), 403),
        "another host": (post(whole, Host="a.example"), 421),
        "no path": (post(whole, "/nothing"), 404),
        "another method": (b"PUT" + post(whole)[4:], 405),
        "5,000 digits": (post(b"{}", Content_Length="9" * 5000), 400),
        "a length below zero": (post(b"{}", Content_Length="-1"), 400),
        "HTTP/9": (b"GET / HTTP/9\r\n\r\n", 400),
        "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
        "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
        "no HTTP": (b"\x00\x01 nonsense\r\n\r\n", 400),
        "a header of 200 kB": (post(b"{}", A="a" * 200_000), 400),
        "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    }
    found = {
        name: Kind((data,), status) for name, (data, status) in kinds.items()
    }
    for name, (data, status) in bombs().items():
        found[f"bomb: {name}"] = Kind((post(ask(data)),), status)
    hundred = post(b"", Content_Length=str(100 * 2**20))
    slow = post(b"", Content_Length="1000")
    return {
        name: Kind((data,), expected)
        for name, (data, expected) in kinds.items()
    } | {
        "100 MB": Kind((hundred, *[MIB] * 100), 413, every=4),
        "100 MB that do not come": Kind((hundred,), 413),
        "100 MB in chunks": Kind(chunked(*[MIB] * 100), 413, every=4),
        "a bad picture in chunks": Kind(chunked(ask(b"hello")), 400),
        "chunks of no length": Kind((chunked()[0], b"zz\r\n"), 400),
        "chunks that end": Kind((chunked()[0], b"5\r\nab"), GONE),
        "a slow head": Kind(
            tuple(slow[i : i + 1] for i in range(99)), LET_GO, pause=1, every=4
        ),
        "a broken head": Kind((slow[:20],) * 99, 400, every=4),
        "silence": Kind((b"GET / HT",), LET_GO, every=4),
        "a slow body": Kind((slow, *[b" "] * 99), 408, pause=1, every=4),
        "no body": Kind((slow,), 408, every=4),
        "gone at once": Kind((post(whole),), GONE),
        "gone within a body": Kind((post(whole)[:5000],), GONE),
        "gone within a stream": Kind((post(ask(image, stream=True)),), GONE),
        "nothing at all": Kind((), GONE),
    }


def send(port, kind):
    """Return a reply's status, or the outcome without one, and its body."""
    with socket.create_connection(("127.0.0.1", port), timeout=180) as link:
        # A server that has refused may close before the rest is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in kind.parts:
                link.sendall(part)
                if kind.pause and _is_answered(link, kind.pause):
                    break
        if kind.status == GONE:
            # Reset the connection, so that the server's next packet has no
            # receiver.
            reset = struct.pack("ii", 1, 0)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            return GONE, b""
        reply = http.client.HTTPResponse(link)
        try:
            reply.begin()
            return reply.status, reply.read()
        except http.client.RemoteDisconnected:
            return LET_GO, b""
        finally:
            reply.close()


def _is_answered(link, seconds):
    link.settimeout(seconds)
    try:
        link.recv(1, socket.MSG_PEEK)
        return True
    except TimeoutError:
        return False
    finally:
        link.settimeout(180)


def text_of(body):
    """Return the text of a reply, or of all pieces of a stream."""
    if body.startswith(b"data: "):
        events = [
            json.loads(event[6:]) for event in body.split(b"\n\n") if event
        ]
        assert events[-1]["text"] == "".join(
            event.get("piece", "") for event in events
        )
        return events[-1]["text"]
    reply = json.loads(body)
    if "choices" in reply:
        assert reply["choices"][0]["logprobs"]["content"]
        return reply["choices"][0]["message"]["content"]
    return reply["text"]


class Soak:
    """A run of requests by many clients.

    Args:
        server: `subprocess.Popen` of the server.
        port: int.
        total: int, requests.
    """

    def __init__(self, server, port, total):
        self.server = server
        self.port = port
        self.total = total
        image = PICTURE.read_bytes()
        self.good = {
            name: Kind((data,), 200) for name, data in good_kinds(image).items()
        }
        bad = bad_kinds(image)
        self.bad = [
            (name, kind)
            for turn in range(max(value.every for value in bad.values()))
            for name, kind in bad.items()
            if turn % kind.every == 0
        ]
        self.numbers = itertools.count()
        self.statuses = collections.Counter()
        self.wrong = collections.Counter()

    def run(self):
        """Send all requests and print the results."""
        self.texts = {
            name: text_of(send(self.port, value)[1])
            for name, value in self.good.items()
        }
        print(f"before: {self.settled():.0f} MiB", flush=True)
        threads = [threading.Thread(target=self.asks) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"after: {self.settled():.0f} MiB")
        print(f"statuses: {dict(self.statuses)}")
        print(f"wrong: {dict(self.wrong) or 'none'} of {self.total}")

    def asks(self):
        """Run a client: send requests until all have been sent."""
        good = list(self.good.items())
        while (number := next(self.numbers)) < self.total:
            kinds = self.bad if number % 2 else good
            name, kind = kinds[number // 2 % len(kinds)]
            try:
                status, body = send(self.port, kind)
                is_right = status == kind.status and (
                    status != 200 or text_of(body) == self.texts[name]
                )
            except Exception as error:  # noqa: BLE001  whatever a client meets
                status, is_right = type(error).__name__, False
            self.statuses[status] += 1
            if not is_right:
                self.wrong[f"{name}: {status}, not {kind.status}"] += 1
            if number % max(1, self.total // 10) == 0:
                print(f"{number}: {self.memory():.0f} MiB", flush=True)

    def settled(self):
        """Return the stable memory, after an idle server's compilations."""
        before = None
        while before is None or abs(self.memory() - before) > 1:
            before = self.memory()
            time.sleep(15)
        return before

    def memory(self):
        """Return the server's resident memory in MiB."""
        lines = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(lines.partition("VmRSS:")[2].split()[0]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "keras_paligemma", "serve"]
    command += [arguments.preset, "--port", "0", "--name", "soak"]
    command += ["--max-seconds", str(SECONDS), "--max-body", str(BODY)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline().rpartition(":")[2])
        try:
            Soak(server, port, arguments.requests).run()
        finally:
            server.terminate()
    print(f"ended by SIGTERM: {server.returncode}")


if __name__ == "__main__":
    main()
