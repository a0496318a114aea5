"""Serve an exported PaliGemma from TensorFlow alone: a page and a JSON API.

    pip install tensorflow tensorflow-text
    python server.py FOLDER [--port 8000]

POST /answer takes JSON with `image` (base64 of a JPEG, PNG, WebP or GIF),
`prompt`, and inputs of the graph that have a default, such as `max_new_tokens`.
It returns `text`, `log_probabilities` of the tokens, and `boxes`: edges as
shares of height and width, and a label. `keras-paligemma serve FOLDER` adds
batches, streams, scores, masks and limits.
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
EXPECTED = (
    f"Expected: POST /answer with at most {MOST_BYTES} bytes of JSON: `image` "
    "(base64), `prompt`, and inputs of the graph that have a default."
)
# What a request that is not as expected raises.
INVALID = (AttributeError, KeyError, OverflowError, RecursionError)
INVALID += (TypeError, ValueError)
BOX = re.compile(
    r"(?<!<loc\d{4}>)((?:<loc\d{4}>){4})(?!<loc)(?:<seg\d{3}>)*\s*([^;<]*)"
)


class Model:
    """The graph of a SavedModel, and its inputs that have a default."""

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
        # More answers at once would only share the same cores.
        self.room = threading.BoundedSemaphore(2)

    def inputs(self, image, prompt, **options):
        """Convert the fields of a request to inputs of the graph."""
        for name, value in options.items():
            # TensorFlow would take 2**32 + 1 for 1.
            is_large = isinstance(value, int) and abs(value) >= 2**31
            if is_large or isinstance(value, bool | list):
                raise ValueError(f"{name}={value!r:.40}")
            options[name] = tf.constant(value, self.defaults[name].dtype)
        picture = base64.b64decode(image.rpartition(",")[2], validate=True)
        options["images"] = tf.constant([picture])
        options["prompts"] = tf.constant([prompt.encode()])
        return self.defaults | options

    def answer(self, inputs):
        """Return a status and the reply."""
        with self.room:
            outputs = self.function(**inputs)
        row = {name: values.numpy()[0] for name, values in outputs.items()}
        if row["error"]:
            return 422, {"error": row["error"].decode()}
        text = row["text"].decode()
        values = row["log_probabilities"][row["token_ids"] != 0].tolist()
        reply = {"text": text, "boxes": boxes(text)}
        return 200, reply | {"log_probabilities": values}


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
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        else:
            self._reply(404, {"error": EXPECTED})

    def do_POST(self):
        # Unread bytes would be taken for the next request.
        is_last, self.close_connection = self.close_connection, True
        length = self.headers.get("Content-Length", "")
        if self.path != "/answer":
            return self._reply(404, {"error": EXPECTED})
        if not re.fullmatch(r"\d{1,20}", length, re.ASCII):
            message = f"Expected: a Content-Length. Received: {length!r:.40}."
            return self._reply(400, {"error": message})
        if int(length) > MOST_BYTES:
            return self._reply(413, {"error": EXPECTED})
        body = self.rfile.read(int(length))
        self.close_connection = is_last or len(body) < int(length)
        try:
            inputs = self.server.model.inputs(**json.loads(body))
        except INVALID as error:
            message = f"{EXPECTED} Received: {error!r:.200}"
            return self._reply(400, {"error": message})
        try:
            return self._reply(*self.server.model.answer(inputs))
        except tf.errors.OpError as error:
            self.log_error("%r", error)
            return self._reply(500, {"error": "The server failed to answer."})

    def _reply(self, status, fields):
        self._send(status, json.dumps(fields).encode(), "application/json")

    def _send(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def main():
    parser = argparse.ArgumentParser(description="Serve an exported model.")
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    server.model = Model(given.folder)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
