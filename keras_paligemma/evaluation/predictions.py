"""The file of predictions, from which a killed run resumes."""

import contextlib
import json
import os
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from keras_paligemma.atomic import locked
from keras_paligemma.config import parse_json
from keras_paligemma.evaluation.run_record import RunRecord
from keras_paligemma.evaluation.samples import check_unique


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file of predictions.

    Args:
        path: path of a JSONL file with one {"id": …, "prediction": …} per line.

    Returns:
        dict of ids to predictions, in the order of the file.

    Raises:
        ValueError: a line is not a prediction, or an id occurs twice.
    """
    pairs = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            pairs.append(_parse(line, f"{path}, line {number}"))
    check_unique([id for id, _ in pairs], f"{path}")
    return dict(pairs)


def check_predictions(
    predictions: Mapping[str, str], ids: Sequence[str]
) -> None:
    """Check that there is exactly one prediction for each sample.

    Raises:
        ValueError: ids without a prediction, or predictions of unknown ids.
    """
    missing = [id for id in ids if id not in predictions]
    unknown = sorted(set(predictions) - set(ids))
    if missing or unknown:
        raise ValueError(
            "Predictions and samples do not match. Expected: one prediction "
            f"for each of {len(ids)} ids. Missing: {len(missing)}, "
            f"{missing[:5]}. Unknown: {len(unknown)}, {unknown[:5]}."
        )


def is_whole(path: Path, ids: Sequence[str], record: RunRecord) -> bool:
    """Return whether a file has all rows of a run.

    Args:
        path, ids, record: as in `resume`.

    Raises:
        ValueError: the file holds rows of another run, or something else.
    """
    return len(_own_lines(path, ids, record)[0]) == len(ids)


def resume(
    path: Path,
    ids: Sequence[str],
    whole: int,
    most: int | None = None,
    record: RunRecord | None = None,
) -> int:
    """Truncate a file to whole batches, after which a run resumes.

    A killed run may leave an incomplete line or batch. Both are cut off, so
    that the batches are those of a run that was never killed. Nothing is cut
    off that this run cannot have written.

    Args:
        path: path of the file, which may be missing.
        ids: list of str, ids of the run's samples, in order.
        whole: int, rows per batch; unless all rows are there, a multiple of
            `whole` is kept.
        most: int, largest number of rows to keep; `None` for all.
        record: `RunRecord` of the rows of `ids`, with which the file's is
            compared, or `None`.

    Returns:
        int, number of rows kept.

    Raises:
        ValueError: the file holds rows of another run, or something else.
    """
    lines, there = _own_lines(path, ids, record)
    done = len(lines)
    if done < len(ids):
        done -= done % whole
    done = done if most is None else min(done, most)
    size = sum(len(line) + 1 for line in lines[:done])
    if size < there:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return done


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Lock a file, created if missing, against runs in other processes.

    The lock ends with its process, however that dies. Windows and some network
    file systems have none; there, nobody is kept out.

    Args:
        path: path of the file.

    Raises:
        ValueError: another run holds the lock.
    """
    path.touch()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError as error:
            raise ValueError(
                f"{path} is in use. Received: the output of a run that still "
                "writes it. Expected: another output, or to wait until that "
                "run has ended."
            ) from error
        except OSError:
            pass
        yield


def append(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Append rows, and wait until they are on the disk."""
    data = b"".join(_line(id, text) for id, text in rows)
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _line(id, text):
    line = json.dumps({"id": id, "prediction": text}, ensure_ascii=False)
    # A model can write half of a character, which is not valid UTF-8.
    return f"{line}\n".encode("utf-8", "backslashreplace")


def _own_lines(path, ids, record):
    """Return the lines of a file of this run, and the size of the file.

    Raises:
        ValueError: the file holds rows of another run, or something else.
    """
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    # Anything after the last newline is an incomplete line.
    *lines, tail = data.split(b"\n")
    found = [
        _parse(line, f"{path}, line {number}")[0]
        for number, line in enumerate(lines, 1)
    ]
    check_unique(found, f"{path}")
    wanted = [*ids[: len(found)], *[None] * (len(found) - len(ids))]
    for there, id in zip(found, wanted, strict=True):
        if there != id:
            raise ValueError(
                f"{path} holds rows of another run. Received: id {there!r}. "
                f"Expected: {'nothing more' if id is None else repr(id)}. "
                "Choose another output, or remove the file."
            )
    if tail and not _begins(tail, ids[len(found) : len(found) + 1]):
        raise ValueError(
            f"{path} ends with what is no row of this run. Received: "
            f"{tail[:80]!r}. Expected: whole lines, or the start of the next "
            "row, as a killed run leaves it. Choose another output, or remove "
            "the file."
        )
    if data and record is not None:
        record.check(path, found)
    return lines, len(data)


def _begins(tail, following):
    """Return whether an incomplete line is one of the row that follows."""
    starts = [_line(id, "").removesuffix(b'"}\n') for id in following]
    return any(
        tail.startswith(start) or start.startswith(tail) for start in starts
    )


def _parse(line, place):
    try:
        record = parse_json(line)
        id, text = record["id"], record["prediction"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} is no prediction. Expected: "
            '{"id": "…", "prediction": "…"}. '
            f"Received: {line[:80]!r}."
        ) from error
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: a prediction is text. Received: {text!r:.80}."
        )
    return str(id), text
