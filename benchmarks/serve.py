"""Measure answers per second of our server, batched or not, and the example's.

    python benchmarks/serve.py [--preset pali_gemma2_nano_112] [--seconds 10]

The first line is the latency of one client and of `generate`. Both run in
turns, so that other load on the machine slows both. Then the three servers
start one after the other, each in its own process. For each, 1, 8 and 64
clients send requests at the same time.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "examples" / "pictures" / "scene_0.png"
PROMPT = "caption en"
CLIENTS = (1, 8, 64)

GENERATE = """
import sys, time
from keras_paligemma import PaliGemmaCausalLM
model = PaliGemmaCausalLM.from_preset(sys.argv[1])
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        started = time.perf_counter()
        model.generate({"images": sys.argv[2], "prompts": sys.argv[3]})
        times.append(time.perf_counter() - started)
    print(*times, flush=True)
"""


class Client:
    """A client that keeps its connection, if the server does.

    The request's bytes are built only once, so that the time of a client
    library is not measured.

    Args:
        port: int.
    """

    def __init__(self, port):
        image = base64.b64encode(PICTURE.read_bytes()).decode()
        body = json.dumps({"image": image, "prompt": PROMPT})
        self.request = (
            "POST /answer HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        self.port = port
        self.connect()

    def connect(self):
        address = ("127.0.0.1", self.port)
        self.link = socket.create_connection(address, timeout=120)
        self.replies = self.link.makefile("rb")

    def ask(self):
        """Return the seconds of an answer, or `None` if the request failed."""
        started = time.perf_counter()
        if self.link.fileno() == -1:
            self.connect()
        self.link.sendall(self.request)
        version, status = self.replies.readline().split()[:2]
        length = 0
        while line := self.replies.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        content = self.replies.read(length)
        took = time.perf_counter() - started
        if version == b"HTTP/1.0":
            self.close()
        return (
            took if status == b"200" and json.loads(content)["text"] else None
        )

    def close(self):
        self.replies.close()
        self.link.close()


def beside_generate(preset, port, turns=20, calls=20):
    """Print the latency of one client and of `generate`, measured in turns.

    Args:
        preset: str.
        port: int, where that preset is served.
        turns: int; the first is not counted.
        calls: int, answers per turn.
    """
    command = [sys.executable, "-c", GENERATE, preset, str(PICTURE), PROMPT]
    generated, served = [], []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        for _ in range(turns):
            print(calls, file=child.stdin, flush=True)
            generated += map(float, child.stdout.readline().split())
            # While a model loads, the server would close an idle connection.
            client = Client(port)
            served += [client.ask() for _ in range(calls)]
            client.close()
        child.stdin.close()
    alone = statistics.median(generated[calls:]) * 1000
    answer = statistics.median(served[calls:]) * 1000
    print(
        f"one client: p50 {answer:.1f} ms, {answer / alone:.2f} x "
        f"`generate`, {alone:.1f} ms",
        flush=True,
    )


def load(port, clients, seconds):
    """Send requests from a number of clients at the same time.

    Returns:
        Seconds of each answer, the number of failures, and the total seconds.
    """
    times, end = [], time.perf_counter() + seconds

    def asks():
        client = Client(port)
        while time.perf_counter() < end:
            times.append(client.ask())
        client.close()

    threads = [threading.Thread(target=asks) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    return [seconds for seconds in times if seconds], times.count(None), took


@contextlib.contextmanager
def served(command):
    """Start a server, and yield its port when it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline().rpartition(":")[2])
            while not _is_ready(port):
                time.sleep(0.5)
            load(port, 1, 1)
            _wait_until_idle(server.pid)
            yield port
        finally:
            server.terminate()


def measure(name, port, seconds):
    """Print a line for each number of clients."""
    for clients in CLIENTS:
        times, wrong, took = load(port, clients, seconds)
        p50 = statistics.median(times)
        p99 = statistics.quantiles(times, n=100)[98]
        print(
            f"{name:22} {clients:3} clients: {len(times) / took:7.1f} a "
            f"second, p50 {p50 * 1000:6.0f} ms, p99 {p99 * 1000:6.0f} ms, "
            f"{wrong} wrong",
            flush=True,
        )


def _is_ready(port):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        link.request("GET", "/readyz")
        # The example has no /readyz, and is ready once it responds.
        return link.getresponse().status in (200, 404)
    except OSError:
        return False
    finally:
        link.close()


def _wait_until_idle(pid):
    """Wait until a server has finished the programs it compiles when idle."""
    ticks = [0]
    while len(ticks) < 5 or ticks[-1] - ticks[-4] > 10:
        time.sleep(1)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
        user, system = map(int, fields.split()[11:13])
        ticks.append(user + system)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    preset, seconds = arguments.preset, arguments.seconds
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(f"{preset} on {backend}", flush=True)
    command = [sys.executable, "-m", "keras_paligemma"]
    serve = [*command, "serve", preset, "--port", "0"]
    with served(serve) as port:
        beside_generate(preset, port)
        measure("serve", port, seconds)
    with served([*serve, "--batch", "1"]) as port:
        measure("serve --batch 1", port, seconds)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        subprocess.run(
            [*command, "export", preset, saved],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        example = ROOT / "examples" / "serve" / "server.py"
        with served([sys.executable, example, saved, "--port", "0"]) as port:
            measure("examples/serve", port, seconds)


if __name__ == "__main__":
    main()
