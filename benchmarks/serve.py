"""Answers a second of our server, batched and not, and of the example's.

    python benchmarks/serve.py [--preset pali_gemma2_nano_112] [--seconds 10]

Starts the three servers one after the other, each in a process of its own, and
asks each by 1, 8 and 64 clients at a time. What `generate` takes for the same
prompt, in a process that does nothing else, is the first line.
"""

import argparse
import base64
import http.client
import json
import os
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
times = []
for _ in range(12):
    started = time.perf_counter()
    model.generate({"images": sys.argv[2], "prompts": sys.argv[3]})
    times.append(time.perf_counter() - started)
print(sorted(times[2:])[5] * 1000)
"""


def load(port, clients, seconds):
    """Ask by so many clients at a time.

    Returns:
        Seconds of each answer that was right, how many were not, and seconds
        of the whole.
    """
    body = json.dumps(
        {
            "image": base64.b64encode(PICTURE.read_bytes()).decode(),
            "prompt": PROMPT,
        }
    )
    times, wrong = [], []
    end = time.perf_counter() + seconds

    def client():
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() < end:
            started = time.perf_counter()
            link.request(
                "POST", "/answer", body, {"Content-Type": "application/json"}
            )
            reply = link.getresponse()
            content = reply.read()
            if reply.status == 200 and json.loads(content)["text"]:
                times.append(time.perf_counter() - started)
            else:
                wrong.append(reply.status)
        link.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, len(wrong), time.perf_counter() - started


def measure(name, command, seconds):
    """Start a server and print a line for each number of clients."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline().rpartition(":")[2])
            while not _is_ready(port):
                time.sleep(0.5)
            load(port, 1, 1)
            for clients in CLIENTS:
                times, wrong, took = load(port, clients, seconds)
                p50 = statistics.median(times)
                p99 = statistics.quantiles(times, n=100)[98]
                print(
                    f"{name:22} {clients:3} clients: "
                    f"{len(times) / took:7.1f} a second, "
                    f"p50 {p50 * 1000:6.0f} ms, p99 {p99 * 1000:6.0f} ms, "
                    f"{wrong} wrong",
                    flush=True,
                )
        finally:
            server.terminate()


def _is_ready(port):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        link.request("GET", "/readyz")
        # The example has /health alone, and is ready when it is there.
        return link.getresponse().status in (200, 404)
    except OSError:
        return False
    finally:
        link.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    preset = arguments.preset
    took = subprocess.run(
        [sys.executable, "-c", GENERATE, preset, str(PICTURE), PROMPT],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(f"generate, {backend}: {float(took):.0f} ms", flush=True)
    command = [sys.executable, "-m", "keras_paligemma"]
    serve = [*command, "serve", preset, "--port", "0"]
    measure("serve", serve, arguments.seconds)
    measure("serve --batch 1", [*serve, "--batch", "1"], arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        subprocess.run(
            [*command, "export", preset, saved],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        example = ROOT / "examples" / "serve" / "server.py"
        measure(
            "examples/serve",
            [sys.executable, example, saved, "--port", "0"],
            arguments.seconds,
        )


if __name__ == "__main__":
    main()
