"""JSONL: one picture, prompt and answer per line."""

import codecs
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from keras_paligemma.config import parse_json
from keras_paligemma.data.examples import located
from keras_paligemma.preprocessing.images import picture_path

_EXPECTED = (
    'Expected: {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"}.'
)
_CHUNK = 2**24


class JSONLSource:
    """Examples of a JSONL file, each read on access.

    The format of the original, Vertex AI and Roboflow: a line has `image`,
    `prefix` and `suffix`. Only the offsets of lines are kept in memory, 16
    bytes each, so the file may exceed memory. Blank lines are skipped; any
    other invalid line raises an error on access.

    Args:
        path: str or path of the file.
        image_folder: str or path that pictures are relative to; the file's
            own folder if `None`. Names may be Windows paths and URIs, see
            `preprocessing.images.picture_path`.
        allow_empty: bool, whether an answer may be empty, as for pictures
            where there is nothing to detect.

    Raises:
        ValueError: if the file does not exist, or is UTF-16, a JSON array, or
            JSON over several lines.
        ExampleError: on `source[index]`, with file and line, if a line is not
            JSON, lacks a field, or has one of another type. Pictures are read
            later, by the preprocessor.

    Example:

    ```python
    source = JSONLSource("train.jsonl", image_folder="pictures")
    source[0]
    # {"images": "pictures/cat.jpg", "prompts": "caption en",
    #  "responses": "a cat"}
    ```

    `image` may be a list (frames), and so may `suffix`: several answers, of
    which `Batches` draws one each epoch, as the original does.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] | None = None,
        allow_empty: bool = False,
    ) -> None:
        self.path = Path(path)
        if starts_array(self.path):
            raise ValueError(
                f"{self.path} is one JSON array. Expected: JSONL, an object a "
                "line without brackets or commas between them. Write it by "
                "`jq -c '.[]' array.json > lines.jsonl`; conversations are "
                "read from arrays too, by `ConversationSource`."
            )
        self.image_folder = os.fspath(image_folder or self.path.parent)
        self.allow_empty = allow_empty
        self.starts, self.lines = _lines(self.path)
        _check_lines(self.path, self.starts[:2])

    def __len__(self):
        return len(self.starts)

    def where(self, index: int) -> str:
        """Return file and line of an example, counted from 1."""
        return f"{self.path}, line {self.lines[index] + 1}"

    def __getitem__(self, index):
        with located(self.where(index)):
            return self._example(self.record(index))

    def record(self, index: int) -> Any:
        """Return the parsed JSON of a line, of any type.

        Raises:
            ValueError: if it is not JSON.
        """
        # Opened each time, so that threads and processes share no position.
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            return parse_json(line)
        except ValueError as error:
            raise ValueError(
                f"The line is not JSON: {error}. Expected: an object on one "
                f"line. Received: {line[:80]!r}"
            ) from error

    def _example(self, record):
        if not isinstance(record, dict) or not (
            {"image", "prefix", "suffix"} <= set(record)
        ):
            received = sorted(record) if isinstance(record, dict) else record
            raise ValueError(
                f"A field is missing. {_EXPECTED} Received: {received!r:.80}."
            )
        several = isinstance(record["image"], list)
        images = [
            picture_path(name, self.image_folder)
            for name in _strings(record, "image")
        ]
        if not isinstance(record["prefix"], str):
            raise ValueError(
                "`prefix` is not text. Expected: a string. Received: "
                f"{record['prefix']!r:.80}."
            )
        answers = _strings(record, "suffix", self.allow_empty)
        return {
            "images": images if several else images[0],
            "prompts": record["prefix"],
            "responses": answers if len(answers) > 1 else answers[0],
        }


def _strings(record, field, allow_empty=False):
    """Return a field as a list of one or more strings."""
    value = record[field]
    strings = value if isinstance(value, list) else [value]
    if not strings or not all(isinstance(string, str) for string in strings):
        raise ValueError(
            f"`{field}` is not text. Expected: a string, or a list of "
            f"strings. Received: {value!r:.80}."
        )
    if not allow_empty and not all(string.strip() for string in strings):
        raise ValueError(
            f"`{field}` is empty. Expected: text. Received: {value!r:.80}. "
            "Where an empty answer is meant, pass `allow_empty=True` (of the "
            "command: `--allow-empty`)."
        )
    return strings


def starts_array(path: Path) -> bool:
    """Return whether a JSON file is one array.

    Args:
        path: path of the file.

    Returns:
        bool; `False` is JSONL, or no JSON at all.

    Raises:
        ValueError: if the file does not exist or is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(
            "The data file does not exist. Expected: path of a JSON "
            f"file. Received: {os.fspath(path)!r}."
        )
    with open(path, "rb") as file:
        head = file.read(4)
        # Without a byte order mark, every second byte is zero in UTF-16.
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or (
            b"\0" in head
        ):
            raise ValueError(
                f"{path} is UTF-16 or UTF-32. Expected: UTF-8, as JSON is. "
                "Save it as UTF-8, in an editor or by `iconv -f UTF-16 -t "
                "UTF-8`."
            )
        file.seek(len(codecs.BOM_UTF8) if head[:3] == codecs.BOM_UTF8 else 0)
        while byte := file.read(1):
            if not byte.isspace():
                return byte == b"["
    return False


def _check_lines(path, starts):
    """Raise one clear error if an object spans several lines."""
    if len(starts) < 2:
        return
    with open(path, "rb") as file:
        file.seek(starts[0])
        first = file.readline().decode("utf-8-sig", "replace").rstrip()
        file.seek(starts[1])
        second = file.readline().lstrip()
    try:
        json.loads(first)
    except RecursionError:
        return
    except json.JSONDecodeError as error:
        # The line ends within its JSON, and the next line is not an object.
        if error.pos >= len(first) and not second.startswith(b"{"):
            raise ValueError(
                f"{path} is JSON of several lines an object. Expected: JSONL, "
                "each object on one line. Write it by `jq -c . pretty.json > "
                "lines.jsonl`."
            ) from error


def _lines(path):
    """Return offsets and numbers of a file's lines, without blank ones.

    Returns:
        Two int64 arrays: offsets in bytes; line numbers, counted from 0.
    """
    parts, maybe_blank, size = [np.zeros(1, "int64")], [np.array([True])], 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            data = np.frombuffer(chunk, "uint8")
            ends = np.flatnonzero(data == ord("\n"))
            parts.append(ends + (size + 1))
            # By the first byte; clipping makes a line past the chunk "\n".
            maybe_blank.append(data.take(ends + 1, mode="clip") <= ord(" "))
            size += len(chunk)
        starts = np.concatenate(parts)
        keep = starts < size
        for line in np.flatnonzero(keep & np.concatenate(maybe_blank)):
            file.seek(starts[line])
            keep[line] = bool(file.readline().strip())
    lines = np.flatnonzero(keep)
    return starts[lines], lines
