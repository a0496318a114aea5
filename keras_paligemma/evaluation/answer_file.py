"""Write answers about pictures to a file; killed runs resume."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_paligemma import atomic
from keras_paligemma import compat
from keras_paligemma.config import parse_json
from keras_paligemma.data.object_set import SUFFIXES
from keras_paligemma.data.object_set import picture_files
from keras_paligemma.evaluation.predicting import predict
from keras_paligemma.evaluation.run_record import RunRecord
from keras_paligemma.evaluation.run_record import describe_image
from keras_paligemma.evaluation.run_record import describe_model
from keras_paligemma.evaluation.run_record import plain
from keras_paligemma.evaluation.run_record import record_path
from keras_paligemma.evaluation.samples import Sample
from keras_paligemma.evaluation.samples import check_unique
from keras_paligemma.evaluation.unread import Unread
from keras_paligemma.evaluation.unread import errors_path
from keras_paligemma.generation.options import prompt_seeds
from keras_paligemma.models.generation_inputs import checked
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.types import PathLike


@dataclass(frozen=True)
class Pictures:
    """Pictures, each with a prompt.

    Args:
        place: str, folder or file of the pictures.
        ids: list of str, unique ids of pictures and answers.
        images: list of pictures, as `generate` takes them.
        prompts: list of str.
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
        """Return the place of a picture, by its id, for error messages."""
        return f"{self.place}, id {self.ids[row]!r}"


def open_pictures(data: PathLike, prompt: str | None = None) -> Pictures:
    """List the pictures of a folder or JSONL file.

    Args:
        data: path of a folder, whose pictures, including those of subfolders,
            are sorted by name, and have their relative paths as ids; or of a
            JSONL file with `image` and, optionally, `prefix` and `id` in each
            line. `image` may be a list of frames; paths are relative to the
            file. The default id is the number of the line. `null` is the same
            as a missing field.
        prompt: str, prompt of pictures without `prefix`.

    Returns:
        `Pictures`.

    Raises:
        ValueError: there are no pictures, a line is not valid, a picture has
            no prompt, or an id occurs twice.
    """
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        records = [
            {"id": file.relative_to(path).as_posix(), "image": str(file)}
            for file in picture_files(path)
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
    given = [record.get("prefix") for record in records]
    prompts: list[Any] = [prompt if each is None else each for each in given]
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
            record = parse_json(line)
            image = record["image"]
            if image is None:
                raise KeyError("image")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} names no picture. Expected: "
                f'{{"image": "…", "prefix": "…"}}. Received: {line[:80]!r}.'
            ) from error
        image = _in_folder(image, os.fspath(path.parent))
        id = number if record.get("id") is None else record["id"]
        records.append({**record, "id": str(id), "image": image})
    return records


def _in_folder(image, folder):
    """Return a picture or frames with paths relative to a folder."""
    if isinstance(image, list):
        return [_in_folder(frame, folder) for frame in image]
    return picture_path(image, folder) if isinstance(image, str) else image


def answer_file(
    model: Any,
    pictures: Pictures,
    output: PathLike,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
    **options: Any,
) -> int:
    """Answer all pictures, batch by batch, into a JSONL file.

    Each batch is on the disk before the next starts, and the same call resumes
    a killed run, without losing or repeating rows. `output`.run.json records
    the model, the options, and the path and prompt of each picture. A call
    resumes if these are the same for all rows that there are, so pictures may
    be added at the end; it refuses rows of another call, and those without a
    record. The contents of picture files are not compared.

    A picture that cannot be read has the answer "" and is listed in
    `output`.errors.jsonl. If a `keras.distribution` is active, each batch is
    split over its devices; with several hosts, each writes its part, and the
    first merges them.

    Args:
        model: `PaliGemmaCausalLM`.
        pictures: `Pictures`, as `open_pictures` returns it.
        output: path of a file with `id` and `prediction` in each line.
        batch_size: int, pictures per batch on this host.
        max_new_tokens: int, tokens of the longest answer; the preprocessor's
            `response_length` if `None`.
        shard: tuple (index, count), this host's part of each batch.
        progress: bool, whether to show a bar if standard error is a terminal.
        **options: how tokens are chosen, as `generate` takes it. A seed gives
            the same answers whatever the batch size. A list has one value per
            picture.

    Returns:
        int, number of pictures that this call could not read.

    Raises:
        ValueError: an option is not valid, or the file holds something else
            than rows of this call.

    Example:

    ```python
    answer_file(model, open_pictures("photos", "caption en"), "answers.jsonl")
    ```
    """
    # Later a mistake here would be reported as an error of the first picture.
    found = checked(model, options)
    _check(found, len(pictures))
    batch_size = to_integer(batch_size, "batch_size")
    length = model.preprocessor.response_length
    if max_new_tokens is not None:
        length = to_integer(max_new_tokens, "max_new_tokens")
    options = {**options, "max_new_tokens": length}
    output = atomic.local(output)
    _check_output(output, pictures.place)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = _record(model, pictures, options)
    if found.seed is not None or found.draws or found.best_of is not None:
        options["seed"] = _seeds(found, len(pictures))
    failed = predict(
        model,
        output.name,
        options,
        pictures,
        output,
        record,
        batch_size=batch_size,
        shard=shard,
        progress=progress,
        unread=Unread(output, pictures.ids),
    )
    if failed and not compat.process()[0]:
        warnings.warn(
            f"{len(failed)} pictures have no answer, since the picture or the "
            f"prompt could not be read. The first: {pictures.where(failed[0])}."
            f" All are listed in {errors_path(output).name}.",
            stacklevel=2,
        )
    return len(failed)


def _check(options, count):
    """Raise on options that a file of one answer per picture cannot follow."""
    if options.num_samples is not None:
        raise ValueError(
            "The file has one answer per picture. Expected: `best_of`, the "
            "likeliest of several samples, or a file for each seed. Received: "
            f"num_samples={options.num_samples!r}."
        )
    options.check_rows(count)


def _check_output(output, data):
    """Raise if a file that is written is that of the pictures."""
    for path in (output, errors_path(output), record_path(output)):
        if path.exists() and os.path.exists(data) and path.samefile(data):
            raise ValueError(
                f"The output would overwrite the data. Received: {path}, which "
                f"is {data}. Choose another output."
            )


def _record(model, pictures, options):
    """Return what the answers of all pictures depend on."""
    given = {
        name: value for name, value in options.items() if value is not None
    }
    rows = [
        [describe_image(image), plain(prompt)]
        for image, prompt in zip(pictures.images, pictures.prompts, strict=True)
    ]
    return RunRecord({**describe_model(model), **plain(given)}, rows)


def _seeds(options, count):
    """Return a seed for each picture, whatever batch it is in."""
    seed = options.seeded().seed
    if np.ndim(seed):
        return seed
    return prompt_seeds(seed, np.arange(count))
