"""The file that lists the pictures a run could not read."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from keras_paligemma.atomic import whole_file
from keras_paligemma.config import parse_json


class Unread:
    """Lists the pictures that could not be read, each once.

    A line is on the disk before the picture's answer "" is. A run that
    resumes drops the lines of pictures that it answers again.

    Args:
        output: path of the file of predictions.
        ids: list of str, ids of all pictures, in order.
    """

    def __init__(self, output: Path, ids: Sequence[str]) -> None:
        self.path = errors_path(output)
        self.ids = ids

    def resume(self, done: int) -> None:
        """Keep only the lines of the first pictures.

        Args:
            done: int, number of pictures that have an answer.

        Raises:
            ValueError: the file holds something else.
        """
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        # Anything after the last newline is an incomplete line.
        *lines, tail = data.split(b"\n")
        found = [self._id(line) for line in lines]
        start = b'{"id": '
        if not (tail.startswith(start) or start.startswith(tail)):
            self._id(tail)
        answered = set(self.ids[:done])
        kept = [
            line + b"\n"
            for line, id in zip(lines, found, strict=True)
            if id in answered
        ]
        if b"".join(kept) == data:
            return
        with whole_file(self.path) as draft:
            draft.write_bytes(b"".join(kept))

    def add(self, row: int, error: Exception) -> None:
        """Append a picture, and wait until it is on the disk."""
        line = {"id": self.ids[row], "error": str(error)}
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with open(self.path, "ab") as file:
            # A file's name may be no valid UTF-8.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())

    def _id(self, line):
        try:
            record = parse_json(line)
            id, _ = record["id"], record["error"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} lists no errors of pictures. Expected: "
                '{"id": "…", "error": "…"} in each line. Received: '
                f"{line[:80]!r}. Choose another output, or remove the file."
            ) from error
        return str(id)


def errors_path(output: Path) -> Path:
    """Return the path of the list of a file of predictions."""
    return output.with_name(f"{output.name}.errors.jsonl")
