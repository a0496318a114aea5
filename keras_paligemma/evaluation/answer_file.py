"""Answers to any number of pictures, in a file that survives kills."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_paligemma import compat
from keras_paligemma.evaluation.predicting import predict
from keras_paligemma.evaluation.samples import Sample
from keras_paligemma.evaluation.samples import check_unique
from keras_paligemma.types import PathLike

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Pictures:
    """Pictures to ask about, each with its prompt.

    Args:
        place: str, the folder or file they come from.
        ids: list of unique strings, which answers are known by.
        images: list of what `generate` takes as a picture.
        prompts: list of strings.
    """

    place: str
    ids: list[str]
    images: list[Any]
    prompts: list[str]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row: int) -> Sample:
        return Sample(self.ids[row], self.images[row], self.prompts[row], {})

    def where(self, row: int) -> str:
        """Name the place of a picture by its id."""
        return f"{self.place}, id {self.ids[row]!r}"


@dataclass(frozen=True)
class _Job:
    """What `predict` reads of a benchmark."""

    name: str
    text_length: int | None
    beams: int


def open_pictures(data: PathLike, prompt: str | None = None) -> Pictures:
    """List the pictures of a folder, or of the lines of a JSONL file.

    Args:
        data: path of a folder, whose pictures are taken in the order of their
            names, those of folders below it too; or of a file with `image`
            and, where prompts differ, `prefix` a line, as `finetune` reads
            them. An `id` names the answer; else the picture's path does of a
            folder, and the line's number of a file.
        prompt: str, for all that have none of their own.

    Raises:
        ValueError: there are no pictures, a line is none, or has no prompt.
    """
    path = Path(data)
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        records = [
            {"id": file.relative_to(path).as_posix(), "image": str(file)}
            for file in found
        ]
    elif path.is_file():
        records = _read_lines(path)
    else:
        records = []
    if not records:
        raise ValueError(
            f"{path} has no pictures. Expected: a folder of "
            f"{', '.join(SUFFIXES)}, or a JSONL file with `image` a line."
        )
    prompts: list[Any] = [record.get("prefix", prompt) for record in records]
    if None in prompts:
        raise ValueError(
            f"{path}: what to ask about {records[prompts.index(None)]['id']!r} "
            "is not said. Expected: `prompt`, or `prefix` in the line."
        )
    ids = [record["id"] for record in records]
    check_unique(ids, str(path))
    images = [record["image"] for record in records]
    return Pictures(str(path), ids, images, prompts)


def _read_lines(path):
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            image = record["image"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} names no picture. Expected: "
                f'{{"image": "…", "prefix": "…"}}. Received: {line[:80]!r}.'
            ) from error
        if isinstance(image, str) and "://" not in image:
            image = os.path.join(path.parent, image)
        id = str(record.get("id", number))
        records.append({**record, "id": id, "image": image})
    return records


def answer_file(
    model: Any,
    pictures: Pictures,
    output: PathLike,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    beams: int = 1,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> int:
    """Answer all pictures, batch by batch, into a JSONL file.

    Each batch is on the disk before the next begins, and the same call goes on
    where a killed one stopped, without a row lost or repeated. A picture that
    cannot be read has the answer "", and is listed in `output`.errors.jsonl.
    Under a distribution the rows of a batch are split over its devices; of
    several hosts each writes its part, and the first puts them together.

    Args:
        model: `PaliGemmaCausalLM`.
        pictures: `Pictures`, of `open_pictures`.
        output: path of the file: `id` and `prediction` a line.
        batch_size: int, pictures at a time, of this host.
        max_new_tokens: int, longest answer; the preprocessor's if `None`.
        beams: int, width of a beam search; 1 answers as the model is compiled.
        shard: (index, count) of this host's part of each batch.
        progress: bool, show a bar where someone looks on.

    Returns:
        int, how many pictures of this call could not be read.

    Raises:
        ValueError: the file holds rows of other pictures.

    Example:

    ```python
    answer_file(model, open_pictures("photos", "caption en"), "answers.jsonl")
    ```
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    job = _Job(
        output.name, max_new_tokens or model.preprocessor.response_length, beams
    )
    errors = []

    def note(row, error):
        errors.append(row)
        line = {"id": pictures.ids[row], "error": str(error)}
        path = output.with_name(f"{output.name}.errors.jsonl")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    predict(model, job, pictures, output, batch_size, shard, progress, note)
    if errors and not compat.process()[0]:
        warnings.warn(
            f"{len(errors)} pictures could not be read, the first: "
            f"{pictures.where(errors[0])}. They are listed in "
            f"{output.name}.errors.jsonl.",
            stacklevel=2,
        )
    return len(errors)
