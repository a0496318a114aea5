"""Serve an exported PaliGemma from TensorFlow alone: a page and a JSON API.

    pip install tensorflow tensorflow-text
    python server.py FOLDER [--port 8000]

This file shows how to call the SavedModel. `keras-paligemma serve FOLDER` adds
batches, streams, scores, masks and limits.

POST /answer takes JSON with `image` (base64 of a JPEG, PNG, WebP or GIF),
`prompt`, and inputs of the graph that have a default, such as `max_new_tokens`.
It returns `text`, `log_probabilities` of the tokens, and `boxes`: edges as
shares of height and width, and a label.
"""

import argparse
import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's operations
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 20 * 2**20
BOX = re.compile(
    r"(?<!<loc\d{4}>)((?:<loc\d{4}>){4})(?!<loc)(?:<seg\d{3}>)*\s*([^;<]*)"
)


class Refused(Exception):
    """A request that is answered with a status of 400 to 499."""


class Model:
    """A SavedModel that answers one prompt about one picture at a time."""

    def __init__(self, folder):
        self.loaded = tf.saved_model.load(folder)
        self.function = self.loaded.signatures["serving_default"]
        # TensorFlow Serving fills in defaults by itself, Python does not.
        content = Path(folder, "saved_model.pb").read_bytes()
        graph = SavedModel.FromString(content).meta_graphs[0]
        defaults = graph.signature_def["serving_default"].defaults
        self.defaults = {
            name: tf.constant(tf.make_ndarray(value))
            for name, value in defaults.items()
        }
        # More at once would only share the same cores.
        self.room = threading.BoundedSemaphore(2)

    def answer(self, body):
        """Answer a request's body; returns a dict for JSON."""
        try:
            fields = json.loads(body)
            image = base64.b64decode(
                fields.pop("image").rpartition(",")[2], validate=True
            )
            inputs = self.defaults | {
                name: scalar(value, self.defaults[name].dtype)
                for name, value in fields.items()
                if name != "prompt"
            }
            prompt = fields["prompt"].encode()
        except (
            *(AttributeError, KeyError, OverflowError),
            *(RecursionError, TypeError, ValueError),
        ) as error:
            raise Refused(
                400,
                "Expected: JSON with `image` (base64), `prompt`, and any of "
                f"{[*self.defaults]}. Received: {error!r:.200}",
            ) from error
        with self.room:
            found = self.function(
                images=tf.constant([image]),
                prompts=tf.constant([prompt]),
                **inputs,
            )
        row = {name: values.numpy()[0] for name, values in found.items()}
        if row["error"]:
            raise Refused(422, row["error"].decode())
        text = row["text"].decode()
        values = row["log_probabilities"][row["token_ids"] != 0].tolist()
        return {"text": text, "boxes": boxes(text), "log_probabilities": values}


def scalar(value, dtype):
    """Convert a number or text; TensorFlow would take 2**32 + 1 for 1."""
    is_large = isinstance(value, int) and abs(value) >= 2**31
    if is_large or isinstance(value, bool | list):
        raise ValueError(f"{value!r:.40}")
    return tf.constant(value, dtype)


def boxes(text):
    """Read an answer's boxes, but for those with edges out of order."""
    found = []
    for places, label in BOX.findall(text):
        edges = [int(number) / 1023 for number in re.findall(r"\d+", places)]
        y1, x1, y2, x2 = edges
        if y1 <= y2 <= 1 and x1 <= x2 <= 1:
            box = {"y1": y1, "x1": x1, "y2": y2, "x2": x2}
            found.append(box | {"label": label.strip()})
    return found


class Handler(BaseHTTPRequestHandler):
    """A connection; `server.model` answers its requests."""

    protocol_version = "HTTP/1.1"
    # Seconds after which an idle client is disconnected.
    timeout = 30

    def do_GET(self):
        if self.path == "/":
            self._send(200, PAGE.read_bytes())
        elif self.path == "/health":
            self._send(200, {"status": "ok"})
        else:
            self._send(404, {"error": "Expected: / or /health."})

    def do_POST(self):
        try:
            self._send(200, self.server.model.answer(self._body()))
        except Refused as error:
            status, message = error.args
            self._send(status, {"error": message})
        except Exception as error:  # noqa: BLE001  keeps serving
            self.log_error("%r", error)
            self._send(500, {"error": "The server failed to answer."})

    def _body(self):
        # Unread bytes would be taken for the next request.
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        if self.path != "/answer":
            raise Refused(404, "Expected: POST /answer.")
        if not re.fullmatch(r"\d{1,20}", length, re.ASCII):
            raise Refused(400, f"Not a Content-Length: {length!r:.40}.")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"Expected: at most {MOST_BYTES} bytes.")
        body = self.rfile.read(int(length))
        self.close_connection = len(body) < int(length)
        return body

    def _send(self, status, answer):
        is_page = isinstance(answer, bytes)
        body = answer if is_page else json.dumps(answer).encode()
        kind = "text/html; charset=utf-8" if is_page else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A thread per connection."""

    request_queue_size = 64


def main():
    parser = argparse.ArgumentParser(description="Serve an exported model.")
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    server = Server((given.host, given.port), Handler)
    server.model = Model(given.folder)
    host, port = server.server_address
    print(f"http://{host}:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
