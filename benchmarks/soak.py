"""Ask a server what is good and what is bad, by 64 clients, and watch it.

    python benchmarks/soak.py PORT PID [--requests 10000]

Half of the requests are bad; each must get its own status. Prints the wrong
ones, and the server's memory (Linux) at each tenth.
"""

import argparse
import base64
import collections
import itertools
import json
import socket
import threading
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "examples" / "pictures" / "scene_0.png"
IMAGE = base64.b64encode(PICTURE.read_bytes()).decode()
GOOD = json.dumps({"image": IMAGE, "prompt": "caption en"}).encode()


def post(body, **headers):
    lines = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Connection": "close",
        "Content-Length": str(len(body)),
    } | headers
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    return f"POST /answer HTTP/1.1\r\n{head}\r\n".encode() + body


def chunked(body):
    lines = {"Transfer-Encoding": "chunked", "Content-Length": None}
    lines = {"Host": "localhost", "Content-Type": "application/json"} | lines
    head = "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v)
    chunk = b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    start = f"POST /answer HTTP/1.1\r\nConnection: close\r\n{head}\r\n"
    return start.encode() + chunk


NO_PICTURE = json.dumps({"image": "AAAA", "prompt": "caption en"}).encode()
# What is sent, and the status that it must get; `None` hangs up at once.
BAD = [
    (post(NO_PICTURE), 400),
    (post(b"[" * 100_000), 400),
    (post(b"{}", **{"Content-Length": "9" * 5000}), 400),
    (post(b"{}", **{"Content-Length": "100000000"}), 413),
    (b"GET / HTTP/9\r\n\r\n", 400),
    (b"\x00\x01 nonsense\r\n\r\n", 400),
    (post(b"{}", **{"Content-Type": "text/plain"}), 415),
    (chunked(NO_PICTURE), 400),
    (post(GOOD), None),
    (post(b'{"image": "', **{"Content-Length": "500"}), None),
]


def ask(port, data, reads):
    """Give status and body; nothing of a client that hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as sock:
        sock.sendall(data)
        if not reads:
            return None, b""
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("pid", type=int)
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    port, total = arguments.port, arguments.requests
    expected = json.loads(ask(port, post(GOOD), True)[1])["text"]
    numbers, wrong = itertools.count(), collections.Counter()
    lock = threading.Lock()

    def client():
        while (number := next(numbers)) < total:
            data, status = post(GOOD), 200
            if number % 2:
                data, status = BAD[number // 2 % len(BAD)]
            try:
                got, body = ask(port, data, status is not None)
            except OSError as error:
                got, body = repr(error), b""
            good = got == status
            if good and status == 200:
                good = json.loads(body)["text"] == expected
            if not good:
                with lock:
                    wrong[f"{data[:40]!r}: {got}, not {status}"] += 1
            if number % (total // 10) == 0:
                lines = Path(f"/proc/{arguments.pid}/status").read_text()
                memory = lines.partition("VmRSS:")[2].split()[0]
                print(f"{number}: {int(memory) / 1024:.0f} MiB", flush=True)

    threads = [threading.Thread(target=client) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{total} requests, wrong: {dict(wrong) or 'none'}")


if __name__ == "__main__":
    main()
