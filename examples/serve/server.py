"""Serve an exported PaliGemma with TensorFlow alone; README.md says how."""

import argparse
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's operations
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

EXPECTED = "Expected: POST /answer with JSON: `image` (base64) and `prompt`."
MOST_BYTES = 20 * 2**20
BODY_ERRORS = (AttributeError, ArithmeticError, LookupError, RecursionError)
BODY_ERRORS += (TypeError, ValueError)
# More answers at once would only share the same cores.
ROOM = threading.Semaphore(2)


def read_defaults(folder, name):
    """Read a signature's optional inputs; TensorFlow Serving does it itself."""
    content = Path(folder, "saved_model.pb").read_bytes()
    signatures = SavedModel.FromString(content).meta_graphs[0].signature_def
    return {
        name: tf.constant(tf.make_ndarray(value))
        for name, value in signatures[name].defaults.items()
    }


def inputs(defaults, image, prompt, **options):
    """Convert the fields of a request to inputs of the graph."""
    for name, value in options.items():
        # TensorFlow would take 2**32 + 1 for 1.
        is_large = isinstance(value, int) and abs(value) >= 2**31
        if is_large or isinstance(value, bool | list):
            raise ValueError(f"{name}={value!r:.40}")
        options[name] = tf.constant(value, defaults[name].dtype)
    picture = base64.b64decode(image.rpartition(",")[2], validate=True)
    options["images"] = tf.constant([picture])
    options["prompts"] = tf.constant([prompt.encode()])
    return defaults | options


class Handler(BaseHTTPRequestHandler):
    timeout = 30

    def do_GET(self):
        if self.path != "/":
            return self._refuse(404, EXPECTED)
        page = Path(__file__).with_name("page.html")
        self._send(200, page.read_bytes(), "text/html")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if self.path != "/answer":
            return self._refuse(404, EXPECTED)
        if not length.isdecimal() or len(length) > 20:
            return self._refuse(400, f"Not a Content-Length: {length!r:.40}.")
        if int(length) > MOST_BYTES:
            return self._refuse(413, f"Expected: at most {MOST_BYTES} bytes.")
        try:
            body = json.loads(self.rfile.read(int(length)))
            given = inputs(self.server.defaults, **body)
        except BODY_ERRORS as error:
            return self._refuse(400, f"{EXPECTED} Received: {error!r:.200}.")
        with ROOM:
            outputs = self.server.graph(**given)
        row = {name: values.numpy()[0] for name, values in outputs.items()}
        if row["error"]:
            return self._refuse(422, row["error"].decode())
        values = row["log_probabilities"][row["token_ids"] != 0].tolist()
        reply = {"text": row["text"].decode(), "log_probabilities": values}
        self._send(200, json.dumps(reply).encode())

    def _refuse(self, status, error):
        self._send(status, json.dumps({"error": error}).encode())

    def _send(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    server.defaults = read_defaults(arguments.folder, "serving_default")
    loaded = tf.saved_model.load(arguments.folder)
    server.graph = loaded.signatures["serving_default"]
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
