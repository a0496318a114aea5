"""Predictions in a file that a killed run can go on with."""

import json
import os
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from keras_paligemma.evaluation.samples import check_unique


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file of predictions.

    Args:
        path: of a JSONL file, {"id": …, "prediction": …} a line.

    Returns:
        Dict of ids to predictions, in the order of the file.

    Raises:
        ValueError: a line is no prediction, or an id occurs twice.
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
    """Refuse predictions that are not those of the samples.

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


def resume(
    path: Path, ids: Sequence[str], whole: int, most: int | None = None
) -> int:
    """Cut a file to the rows that a run goes on behind.

    A kill may leave a line without its end, or a part of a batch. Both are cut
    off, so that batches are the same as those of a run that was never killed.

    Args:
        path: of the file, which may be missing.
        ids: of the run's samples, in order.
        whole: int, rows of a batch; how many rows are kept divides by it, or
            all are there.
        most: int, at most so many rows are kept.

    Returns:
        Int, how many rows are there.

    Raises:
        ValueError: the file holds rows of another run.
    """
    if not path.is_file():
        return 0
    data = path.read_bytes()
    # What follows the last line's end was being written.
    *lines, _ = data.split(b"\n")
    found = [
        _parse(line, f"{path}, line {number}")[0]
        for number, line in enumerate(lines, 1)
    ]
    check_unique(found, f"{path}")
    wanted = [*ids[: len(found)], *[None] * (len(found) - len(ids))]
    for there, one in zip(found, wanted, strict=True):
        if there != one:
            raise ValueError(
                f"{path} holds rows of another run. Received: id {there!r}. "
                f"Expected: {'nothing more' if one is None else repr(one)}. "
                "Choose another output, or remove the file."
            )
    done = len(found)
    if done < len(ids):
        done -= done % whole
    done = done if most is None else min(done, most)
    size = sum(len(line) + 1 for line in lines[:done])
    if size < len(data):
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return done


def append(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write rows behind the others, and wait until they are on the disk."""
    lines = [
        json.dumps({"id": id, "prediction": text}, ensure_ascii=False) + "\n"
        for id, text in rows
    ]
    # Half of a character that a model wrote is no UTF-8.
    data = "".join(lines).encode("utf-8", "backslashreplace")
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _parse(line, place):
    try:
        one = json.loads(line)
        id, text = one["id"], one["prediction"]
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
