"""Serve an exported PaliGemma: a page and a JSON API, in one file.

    pip install tensorflow tensorflow-text
    python server.py FOLDER [--port 8000] [--codec vae-oid.npz]

Needs TensorFlow and tensorflow-text, but not keras_paligemma, except for the
masks of `segment`: `--codec` decodes them with `keras_paligemma.tasks`, which
does not load Keras.

POST /answer takes JSON with `image` (base64 of a JPEG, PNG, WebP or GIF),
`prompt`, optionally `max_new_tokens` and `temperature`, and `adapter` where the
model has named adapters. It returns `text`, `boxes`, and `log_probabilities` of
the tokens. A box has its edges as shares of height and width, its `label`, and
its `score`. It has the 16 `codes` of its mask if the answer contains them, and
with `--codec` also `mask`, the URI of a PNG that fills the box and is opaque on
the object. Errors of a request are returned as {"error": …} with a status from
400 to 499.
"""

import argparse
import base64
import binascii
import bisect
import itertools
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import tensorflow as tf
import tensorflow_text  # noqa: F401  registers the tokenizer's operations

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 20 * 2**20
OBJECT = re.compile(
    r"(?<!<loc\d{4}>)((?:<loc\d{4}>){4})(?!<loc)((?:<seg\d{3}>)*)\s*([^;<]*)"
)
NUMBER = re.compile(r"\d+")
ENDS = (b"<eos>", b"</s>")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
LAST_LOCATION, CODES = 1023, 16


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Model:
    """A SavedModel that answers one picture and prompt at a time.

    Args:
        folder: str or path, a folder written by `model.export`.
        at_once: int, maximum requests computed at the same time; others wait.
        codec: `keras_paligemma.tasks.mask_codec.MaskCodec`, or `None` to
            return masks as codes.
    """

    def __init__(self, folder, at_once=2, codec=None):
        self.loaded = tf.saved_model.load(str(folder))
        self.function = self.loaded.signatures["serving_default"]
        self.codec = codec
        self.room = threading.BoundedSemaphore(at_once)
        self.defaults = self._defaults(folder)

    def _defaults(self, folder):
        """Read the defaults from the file, as TensorFlow Serving does."""
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
            **options: `max_new_tokens`, by default the maximum;
                `temperature`; `adapter`, where the model has adapters.

        Returns:
            Dict of `text`, `boxes` and `log_probabilities`.

        Raises:
            Refused: the model refuses the inputs.
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
        values = outputs["log_probabilities"].numpy()[0][written].tolist()
        tokens = outputs["tokens"].numpy()[0][written]
        # An end token is not part of the answer's last word.
        texts = ["" if token in ENDS else token.decode() for token in tokens]
        return {
            "text": text,
            "boxes": boxes(texts, values, self.codec),
            "log_probabilities": values,
        }


def boxes(tokens, log_probabilities, codec=None):
    """Read the boxes of an answer.

    A score is the geometric mean of the probabilities of the four location
    tokens, times that of the label's tokens.

    Args:
        tokens: list of str, SentencePiece pieces.
        log_probabilities: list of floats, at least one per token.
        codec: `MaskCodec` or `None`.

    Returns:
        List of dicts that can be converted to JSON.
    """
    texts = spell(tokens)
    ends = list(itertools.accumulate(map(len, texts)))
    found = []
    for match in OBJECT.finditer("".join(texts)):
        numbers = [int(number) for number in NUMBER.findall(match[1])]
        y1, x1, y2, x2 = (number / LAST_LOCATION for number in numbers)
        if not (y1 <= y2 <= 1 and x1 <= x2 <= 1):
            continue
        label = match[3].strip()
        start = match.start(3)
        places = log_probabilities[tokens_of(ends, *match.span(1))]
        words = log_probabilities[tokens_of(ends, start, start + len(label))]
        means = [sum(part) / len(part) for part in (places, words) if part]
        codes = [int(number) for number in NUMBER.findall(match[2])]
        box = {"y1": y1, "x1": x1, "y2": y2, "x2": x2}
        box |= {"label": label, "score": math.exp(sum(means))}
        if len(codes) == CODES and max(codes) < 128:
            box["codes"] = codes
            if codec is not None:
                box["mask"] = picture_of(codec.decode([codes])[0] > 0)
        found.append(box)
    return found


def tokens_of(ends, first, end):
    """Return the slice of the tokens with characters from first to end."""
    last = bisect.bisect_left(ends, end) + 1 if end > first else 0
    # All bytes of the last character but its first have no text.
    last += sum(other == ends[last - 1] for other in ends[last:]) if last else 0
    return slice(bisect.bisect_right(ends, first), last)


def spell(tokens):
    """Return the text of each token; a character's first byte has its text."""
    texts, waiting = [], b""
    for token in tokens:
        byte = BYTE.fullmatch(token)
        if byte is None:
            texts.append(token.replace("\u2581", " "))
            waiting = b""
            continue
        texts.append("")
        waiting += bytes.fromhex(byte[1])
        try:
            text = waiting.decode()
        except UnicodeDecodeError:
            continue
        texts[-len(waiting)] = text
        waiting = b""
    return texts


def picture_of(mask):
    """Return a bool array as a PNG's URI: white, opaque where it is true."""
    alpha = tf.cast(mask, tf.uint8)[..., None] * 255
    white = tf.ones([*mask.shape, 3], tf.uint8) * 255
    pixels = tf.concat([white, alpha], -1)
    encoded = base64.b64encode(tf.io.encode_png(pixels).numpy()).decode()
    return f"data:image/png;base64,{encoded}"


def read_request(body):
    """Convert the body of a request to the arguments of `Model.answer`."""
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
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
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
    """A connection; `server.model` answers its requests."""

    protocol_version = "HTTP/1.1"
    # Seconds after which an idle client is disconnected.
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
        # Unread bytes would be taken for the next request.
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
    """A server with a thread per connection, and one model for all of them."""

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
    parser.add_argument("--codec", help="npz file that decodes masks")
    arguments = parser.parse_args()
    codec = None
    if arguments.codec is not None:
        from keras_paligemma.tasks.mask_codec import MaskCodec

        codec = MaskCodec.load(arguments.codec)
    model = Model(arguments.folder, codec=codec)
    server = Server((arguments.host, arguments.port), model)
    host, port = server.server_address
    print(f"http://{host}:{port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
