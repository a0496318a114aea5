"""Serve an exported PaliGemma: a page and a JSON API, in one file.

    pip install tensorflow tensorflow-text
    python server.py FOLDER [--port 8000]

Needs TensorFlow and tensorflow-text, and nothing of keras_paligemma.

POST /answer takes JSON: `image` (base64 of a JPEG, PNG, WebP or GIF), `prompt`,
and if wanted `max_new_tokens` and `temperature`, and `adapter` where the model
has named ones. It gives `text`, `boxes` as
shares of height and width, and `log_probabilities` of the tokens. What is wrong
with a request comes as {"error": …} and a status from 400 to 499.
"""

import argparse
import base64
import binascii
import json
import re
import threading
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's operations

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 20 * 2**20
BOX = re.compile(r"<loc(\d{4})>" * 4 + r"(?:<seg\d{3}>)*([^;<]*)")
LAST_LOCATION = 1023


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Model:
    """A SavedModel that answers one picture and prompt at a time.

    Args:
        folder: str or path, as `model.export` wrote it.
        at_once: int, requests that compute at the same time; others wait.
    """

    def __init__(self, folder, at_once=2):
        self.loaded = tf.saved_model.load(str(folder))
        self.function = self.loaded.signatures["serving_default"]
        self.room = threading.BoundedSemaphore(at_once)
        self.defaults = self._defaults(folder)

    def _defaults(self, folder):
        """Read from the file what TensorFlow Serving reads there, too."""
        from tensorflow.core.protobuf import saved_model_pb2

        content = (Path(folder) / "saved_model.pb").read_bytes()
        graph = saved_model_pb2.SavedModel.FromString(content).meta_graphs[0]
        defaults = graph.signature_def["serving_default"].defaults
        return {
            name: tf.constant(tf.make_ndarray(value))
            for name, value in defaults.items()
        }

    def answer(self, image, prompt, **options):
        """Answer one prompt about one picture.

        Args:
            image: bytes of an encoded picture.
            prompt: str.
            **options: `max_new_tokens`, the longest answer if not given;
                `temperature`; `adapter`, where the model has them.

        Returns:
            Dict of `text`, `boxes` and `log_probabilities`.

        Raises:
            Refused: the model says what is wrong.
        """
        unknown = sorted(options.keys() - self.defaults.keys())
        if unknown:
            raise Refused(400, f"This model has no {', '.join(unknown)}.")
        given = {
            name: tf.constant(value, self.defaults[name].dtype)
            for name, value in options.items()
        }
        with self.room:
            outputs = self.function(
                images=tf.constant([image]),
                prompts=tf.constant([prompt]),
                **self.defaults | given,
            )
        error, text = (
            outputs[name].numpy()[0].decode() for name in ("error", "text")
        )
        if error:
            raise Refused(422, error)
        written = outputs["token_ids"].numpy()[0] != 0
        scores = outputs["log_probabilities"].numpy()[0][written].tolist()
        return {
            "text": text,
            "boxes": boxes(text),
            "log_probabilities": scores,
        }


def boxes(text):
    """Read the boxes of an answer: label, and edges from 0 to 1."""
    found = []
    for *edges, label in BOX.findall(text):
        y1, x1, y2, x2 = (int(edge) / LAST_LOCATION for edge in edges)
        box = {"y1": y1, "x1": x1, "y2": y2, "x2": x2}
        found.append({"label": label.strip(), **box})
    return found


def read_request(body):
    """Turn the body of a request into the arguments of `Model.answer`."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise Refused(400, "Expected: a JSON object with image and prompt.")
    known = {
        "image": str,
        "prompt": str,
        "max_new_tokens": int,
        "temperature": (int, float),
        "adapter": str,
    }
    for key, value in request.items():
        if key not in known:
            raise Refused(400, f"Unknown field {key!r}. Expected: {[*known]}.")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise Refused(400, f"{key!r} has the wrong type: {value!r:.40}.")
    if not {"image", "prompt"} <= request.keys():
        raise Refused(400, "Expected: `image`, in base64, and `prompt`.")
    if abs(request.get("max_new_tokens", 1)) >= 2**31:
        raise Refused(400, "`max_new_tokens` is out of range.")
    try:
        float(request.get("temperature", 0))
        # JSON can spell halves of letters, which no UTF-8 has.
        for key in {"prompt", "adapter"} & request.keys():
            request[key] = request[key].encode()
    except (OverflowError, UnicodeEncodeError) as error:
        raise Refused(400, f"A value cannot be read: {error}") from error
    data = request["image"]
    if data.startswith("data:"):  # As browsers write files.
        data = data.partition(",")[2]
    try:
        image = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"`image` is not base64: {error}") from error
    return request | {"image": image}


class Handler(BaseHTTPRequestHandler):
    """One connection; `server.model` answers."""

    protocol_version = "HTTP/1.1"
    # Who sends nothing for so many seconds is let go.
    timeout = 30

    def do_GET(self):
        if self.path == "/":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/health":
            self._send_json(200, {"status": "ok"})
        else:
            self._send_json(404, {"error": "Expected: / or /health."})

    def do_POST(self):
        try:
            answer = self.server.model.answer(**read_request(self._body()))
        except Refused as error:
            self._send_json(error.status, {"error": str(error)})
        except Exception as error:  # noqa: BLE001  keeps serving
            self.log_error("%r", error)
            self._send_json(500, {"error": "The server failed to answer."})
        else:
            self._send_json(200, answer)

    def _body(self):
        # Whatever is left unread would be taken for the next request.
        self.close_connection = True
        if self.path != "/answer":
            raise Refused(404, "Expected: POST /answer.")
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(411, "Expected: a Content-Length.")
        if not length.isascii() or not length.isdigit():
            raise Refused(400, f"Not a length: {length!r:.40}.")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"Expected: at most {MOST_BYTES} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "The body ends before its Content-Length.")
        self.close_connection = False
        return body

    def _send_json(self, status, answer):
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A thread a connection, one model for all of them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address, model):
        super().__init__(address, Handler)
        self.model = model


def main():
    parser = argparse.ArgumentParser(description="Serve an exported model.")
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    model = Model(arguments.folder)
    server = Server((arguments.host, arguments.port), model)
    host, port = server.server_address
    print(f"http://{host}:{port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
