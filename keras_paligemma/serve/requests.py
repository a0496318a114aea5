"""Requests of clients, validated before the model runs, and their answers."""

import base64
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from keras_paligemma.preprocessing.images import MOST_SCANS
from keras_paligemma.preprocessing.images import read_image

# Pillow reads other formats too, some by running another program (EPS), or
# decodes them while it opens them (ICO).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# Commas and brackets of a JSON body. 20 MB of them would take a second to read,
# in which the server does nothing else.
MOST_VALUES = 100_000


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: int, HTTP status code.
        message: str, for the client.
        field: str, name of the invalid field, or `None`.
        headers: dict, additional headers of the response.
    """

    def __init__(self, status, message, field=None, headers=None):
        super().__init__(message)
        self.status = status
        self.field = field
        self.headers = headers or {}

    @classmethod
    def of(cls, error):
        """Return an error as clients may read it, others without details."""
        if isinstance(error, cls):
            return error
        return cls(500, "The server failed to answer.")


@dataclass(frozen=True)
class Limits:
    """Upper limits of a request.

    Args:
        body: int, bytes.
        pixels: int, of a picture, from its header, before it is decoded.
        prompt: int, characters.
        seconds: float, to receive the body, and to send the response.
        connections: int, open at the same time.
        copies: int, answers per prompt.
    """

    body: int = 20 * 2**20
    pixels: int = 40_000_000
    prompt: int = 4096
    seconds: float = 30.0
    connections: int = 1024
    copies: int = 16


@dataclass(frozen=True)
class Choice:
    """The decoding options of a request.

    Args:
        max_new_tokens: int, or `None` for the model's longest answer.
        temperature: float; 0 is greedy decoding.
        top_p: float.
        top_k: int, or `None` for all.
        seed: int, or `None` for any.
        stop: tuple of strs that end the answer.
        adapter: str, or `None` for the one that the model was started with.
        alternatives: int, number of likeliest tokens returned per position.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    alternatives: int = 0

    def length(self, longest):
        """Return the longest answer, in tokens, of a model's `longest`."""
        return min(self.max_new_tokens or longest, longest)


@dataclass(frozen=True)
class Request:
    """A picture and a prompt, prepared for the model's thread.

    Args:
        inputs: what the model's `read` returned.
        choice: `Choice`.
        streams: bool, whether text is sent as it is generated.
    """

    inputs: Any
    choice: Choice
    streams: bool = False


@dataclass(frozen=True)
class Answered:
    """An answer, token by token.

    Args:
        text: str.
        tokens: strs, or () if the model's file does not return them; joined
            they are the text, but the bytes of a character are spelt as
            "<0xE2>", and a stop string is not cut from them.
        token_ids: ints, including the stop token.
        log_probabilities: floats, one per token.
        finish: "stop" or "length".
        alternatives: for each token a tuple of (str, float).
        prompt_tokens: int.
    """

    text: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: str
    alternatives: tuple = ()
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Field:
    """A field of a JSON body: its type, range and meaning.

    Args:
        kind: "string", "integer", "number", "boolean", "strings" or "any".
        about: str, its description for the API's page.
        least, most: range of a number.
        default: the value if the field is missing; `...` if it is required.
    """

    kind: str
    about: str
    least: float = -math.inf
    most: float = math.inf
    default: Any = None

    def check(self, name, value):
        """Return the value, or raise `Refused` with the field's name."""
        kinds = {
            "string": (str,),
            "integer": (int,),
            "number": (int, float),
            "boolean": (bool,),
            "strings": (str, list),
            "any": (object,),
        }[self.kind]
        is_bool = isinstance(value, bool)
        good = isinstance(value, kinds) and (
            not is_bool or self.kind in ("boolean", "any")
        )
        if good and self.kind in ("integer", "number"):
            good = self.least <= value <= self.most
        if good and self.kind == "strings" and isinstance(value, list):
            good = all(isinstance(item, str) for item in value)
        if not good:
            bounds = ""
            if self.least > -math.inf:
                bounds = f", {self.least} to {self.most}"
            raise Refused(
                400,
                f"`{name}` is wrong. Expected: {self.kind}{bounds}. Received: "
                f"{repr(value)[:60]}.",
                name,
            )
        if isinstance(value, str):
            check_text(value, name)
        return value


def _no_number(text):
    raise ValueError(f"{text} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _values(body):
    """Return the number of commas and brackets of a body."""
    return sum(map(body.count, (b",", b"[", b"{")))


def read_json(body):
    """Parse a body: one JSON object without NaN or infinities.

    Args:
        body: bytes.

    Returns:
        Dict.

    Raises:
        Refused: if it is anything else.
    """
    # Only long bodies are counted: a short one cannot have so many.
    if len(body) > MOST_VALUES and _values(body) > MOST_VALUES:
        raise Refused(
            400, f"The body has more than {MOST_VALUES:,} values of JSON."
        )
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Refused(
            400, f"The body is not JSON: {str(error)[:100]}."
        ) from error
    if not isinstance(value, dict):
        raise Refused(
            400,
            "The body is no JSON object. Expected: {…}. Received: "
            f"{type(value).__name__}.",
        )
    return value


def read_fields(body, fields, ignores=()):
    """Check the fields of a body.

    Args:
        body: dict.
        fields: dict of name to `Field`.
        ignores: names of fields that are accepted and ignored.

    Returns:
        dict of all names; defaults for fields that are missing or `null`.

    Raises:
        Refused: if a field is unknown, missing or of a wrong type.
    """
    for name in body:
        if name not in fields and name not in ignores:
            raise Refused(
                400,
                f"Unknown field {name[:60]!r}. Expected: {', '.join(fields)}.",
                ascii(name[:60])[1:-1],
            )
    found = {}
    for name, field in fields.items():
        value = body.get(name)
        if value is None:
            if field.default is ...:
                raise Refused(400, f"The field `{name}` is missing.", name)
            found[name] = field.default
        else:
            found[name] = field.check(name, value)
    return found


def check_prompt(prompt, limits, field="prompt"):
    """Raise on prompts that are too long or not valid text."""
    if len(prompt) > limits.prompt:
        raise Refused(
            400,
            f"The prompt is too long. Expected: at most {limits.prompt} "
            f"characters. Received: {len(prompt)}.",
            field,
        )
    check_text(prompt, field)


def check_text(text, field):
    """Raise on lone surrogates: JSON can hold them, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            400, f"`{field}` is no text: {error.reason}.", field
        ) from error


def read_stop(stop):
    """Return the strings that end an answer as a tuple."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stop) > 4 or not all(0 < len(string) <= 100 for string in stop):
        raise Refused(
            400,
            "`stop` is wrong. Expected: at most 4 strings of 1 to 100 "
            "characters.",
            "stop",
        )
    return stop


def read_base64(text, field="image"):
    """Return the bytes of base64, or of a data: URI."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise Refused(400, "The data: URI is not in base64.", field)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Refused(
            400, f"The picture is not base64: {error}.", field
        ) from error


def open_picture(data, limits):
    """Open a file and check its number of pixels; nothing is decoded yet.

    Args:
        data: bytes of an encoded picture.
        limits: `Limits`.

    Returns:
        `PIL.Image.Image`, which reads its pixels when they are needed.

    Raises:
        Refused: if it is not a picture, or too large.
    """
    # Other bytes 255 of a JPEG's data are followed by a zero.
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise Refused(
            400, f"The JPEG has more than {MOST_SCANS} scans.", "image"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = math.inf
    # Pillow has no common base class for errors of broken files.
    except Exception as error:  # noqa: BLE001
        raise Refused(
            400,
            "The picture cannot be read. Expected: a JPEG, PNG, WebP or GIF.",
            "image",
        ) from error
    if pixels > limits.pixels:
        raise Refused(
            413,
            f"The picture is too large. Expected: at most {limits.pixels:,} "
            "pixels.",
            "image",
        )
    return image


def decode_picture(data, limits) -> np.ndarray:
    """Decode a picture as in the rest of the package; see `read_image`.

    Args:
        data: bytes of an encoded picture.
        limits: `Limits`.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        Refused: if it is not a picture, or too large.
    """
    try:
        with open_picture(data, limits) as image:
            return read_image(image)
    except ValueError as error:
        raise Refused(400, str(error)[:300], "image") from error


def power_of_two(largest):
    """Return `largest`; raise if it is not a power of two."""
    if largest < 1 or largest & (largest - 1):
        raise ValueError(
            "A batch holds a power of two of requests. Expected: 1, 2, 4, 8, "
            f"…. Received: {largest}."
        )
    return largest


def sizes(largest):
    """Return the sizes of batches: 1, 2, 4, … `largest`."""
    return [1 << power for power in range(largest.bit_length())]


def with_seed(choice, number):
    """Return the choice of the copy `number`, with a seed of its own."""
    if choice.seed is None:
        return choice
    return dataclasses.replace(choice, seed=(choice.seed + number) % 2**31)
