"""What clients ask, checked before the model sees it, and what they get."""

import base64
import binascii
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from keras_paligemma.preprocessing.images import read_image


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: int, of HTTP.
        message: str, for the client.
        field: str, the field that is wrong, or `None`.
        headers: dict, more headers of the reply.
    """

    def __init__(self, status, message, field=None, headers=None):
        super().__init__(message)
        self.status = status
        self.field = field
        self.headers = headers or {}


@dataclass(frozen=True)
class Limits:
    """What a request may have at most.

    Args:
        body: int, bytes.
        pixels: int, of a picture, as its file says before it is decoded.
        prompt: int, characters.
        seconds: float, until the body is there, and until the client has taken
            what it is sent.
        connections: int, open at the same time.
        copies: int, answers to one prompt.
    """

    body: int = 20 * 2**20
    pixels: int = 40_000_000
    prompt: int = 4096
    seconds: float = 30.0
    connections: int = 1024
    copies: int = 16


@dataclass(frozen=True)
class Choice:
    """How an answer is chosen.

    Args:
        max_new_tokens: int, or `None` for the model's longest answer.
        temperature: float; 0 takes the likeliest tokens.
        top_p: float.
        top_k: int, or `None` for all.
        seed: int, or `None` for any.
        stop: tuple of strs that end the answer.
        adapter: str or `None`, the one that the model was started with.
        alternatives: int, the likeliest tokens told at each place.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    alternatives: int = 0


@dataclass(frozen=True)
class Request:
    """A picture and a prompt as the model's thread takes them.

    Args:
        inputs: what `read` of the model made of them.
        choice: `Choice`.
        streams: bool, the text is wanted as it comes.
    """

    inputs: Any
    choice: Choice
    streams: bool = False


@dataclass(frozen=True)
class Answered:
    """An answer, token by token.

    Args:
        text: str.
        tokens: strs, or () where the model's file does not tell them.
        token_ids: ints, the one that ended it included.
        log_probabilities: floats, one a token.
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
        about: str, for the page of the API.
        least, most: range of a number.
        default: what a body without it means; `...` if it must have it.
    """

    kind: str
    about: str
    least: float = -math.inf
    most: float = math.inf
    default: Any = None

    def check(self, name, value):
        """Give the value, or refuse it with the field's name."""
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
            good = all(isinstance(one, str) for one in value)
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
        return value


def read_json(body):
    """Parse a body: one JSON object, of numbers and letters that there are.

    Args:
        body: bytes.

    Returns:
        Dict.

    Raises:
        Refused: it is something else.
    """

    def no_number(text):
        raise ValueError(f"{text} is no number of JSON")

    try:
        value = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:100] or "too deep"
        raise Refused(400, f"The body is not JSON: {reason}.") from error
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
        ignores: names that are let through unread.

    Returns:
        Dict of all names; defaults where the body has none or `null`.

    Raises:
        Refused: an unknown field, one of a wrong type, or one is missing.
    """
    for name in body:
        if name not in fields and name not in ignores:
            raise Refused(
                400,
                f"Unknown field {name[:60]!r}. Expected: {', '.join(fields)}.",
                name[:60],
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


def read_prompt(prompt, limits, field="prompt"):
    """Refuse prompts that are too long or no text."""
    if len(prompt) > limits.prompt:
        raise Refused(
            400,
            f"The prompt is too long. Expected: at most {limits.prompt} "
            f"characters. Received: {len(prompt)}.",
            field,
        )
    try:
        # JSON can spell halves of letters, which no UTF-8 has.
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            400, f"The prompt is no text: {error.reason}.", field
        ) from error
    return prompt


def read_stop(stop):
    """Give strings that end an answer as a tuple."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stop) > 4 or not all(0 < len(one) <= 100 for one in stop):
        raise Refused(
            400,
            "`stop` is wrong. Expected: at most 4 strings of 1 to 100 "
            "characters.",
            "stop",
        )
    return stop


def read_base64(text, field="image"):
    """Give the bytes of base64, or of a data: URI as browsers write files."""
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise Refused(400, "The data: URI is not in base64.", field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"The picture is not base64: {error}.", field) from (
            error
        )


def check_picture(data, limits, field="image"):
    """Refuse a file of too many pixels, before it is decoded.

    Args:
        data: bytes of an encoded picture.
        limits: `Limits`.
        field: str, where it came from.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        width = height = limits.pixels
    # Pillow has no common base for what broken files raise.
    except Exception as error:  # noqa: BLE001
        raise Refused(
            400,
            "The picture cannot be read. Expected: a JPEG, PNG, WebP or GIF.",
            field,
        ) from error
    if width * height > limits.pixels:
        raise Refused(
            413,
            f"The picture is too large. Expected: at most {limits.pixels:,} "
            "pixels.",
            field,
        )


def decode_picture(data, limits, field="image") -> np.ndarray:
    """Decode a file as all of the package does; see `read_image`.

    Args:
        data: bytes of an encoded picture.
        limits: `Limits`.
        field: str, where it came from.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        Refused: no picture, or too large a one.
    """
    check_picture(data, limits, field)
    try:
        return read_image(data, field)
    except ValueError as error:
        raise Refused(400, str(error)[:300], field) from error


def power_of_two(largest):
    """Give the most requests of a batch, or refuse what cannot be."""
    if largest < 1 or largest & (largest - 1):
        raise ValueError(
            "A batch holds a power of two of requests. Expected: 1, 2, 4, 8, "
            f"…. Received: {largest}."
        )
    return largest


def sizes(largest):
    """Give the sizes of batches: 1, 2, 4, … `largest`."""
    return [1 << power for power in range(largest.bit_length())]


def with_seed(choice, number):
    """Give the choice of the copy of a number: a seed of its own."""
    if choice.seed is None:
        return choice
    return dataclasses.replace(choice, seed=(choice.seed + number) % 2**31)
