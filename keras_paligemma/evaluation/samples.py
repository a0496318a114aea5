"""Samples of a benchmark: pictures, a prompt, and the ground truth."""

import dataclasses
import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from keras_paligemma.data.examples import located
from keras_paligemma.data.fields import fill
from keras_paligemma.evaluation.records import Picked
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.tasks.prompts import BETWEEN_OPTIONS


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        id: str, unique in its split.
        images: a picture, or a list of pictures or frames.
        prompt: str.
        truth: dict of the fields that metrics and fine-tunes use.
    """

    id: str
    images: Any
    prompt: str
    truth: Mapping[str, Any]


class Samples:
    """Samples of a benchmark, each created on access.

    Args:
        benchmark: `Benchmark`.
        records: sequence of dicts with the benchmark's fields: `id`, `images`,
            those of the prompt, and the ground truth.
        place: str, name of the data in error messages.

    Raises:
        ValueError: there are no samples, or an id occurs twice.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        records: Sequence[Mapping[str, Any]],
        place: str,
    ) -> None:
        if not len(records):
            raise ValueError(
                f"{place} has no samples for {benchmark.name}, split "
                f"{benchmark.split!r}. Expected: one or more."
            )
        self.benchmark = benchmark
        self.place = place
        self.records = records
        self.ids = [record_id(row, each) for row, each in enumerate(records)]
        check_unique(self.ids, f"{place}, split {benchmark.split!r},")

    def __len__(self):
        return len(self.records)

    def where(self, index: int) -> str:
        """Return the place of a sample, by its id, for error messages."""
        return f"{self.place}, id {self.ids[index]!r}"

    def __getitem__(self, index: int) -> Sample:
        sample = self.unopened(index)
        with located(self.where(index)):
            images = _opened(sample, self.benchmark)
        return dataclasses.replace(sample, images=images)

    def unopened(self, index: int) -> Sample:
        """Return a sample with its pictures as they are in the data.

        Paths are not read, no frames are picked, nothing is drawn or turned.
        """
        with located(self.where(index)):
            record = dict(self.records[index])
            return Sample(
                self.ids[index],
                _images(record, self.benchmark),
                _prompt(self.benchmark.prompt, record),
                self._truth(record),
            )

    def truth(self, index: int) -> dict[str, Any]:
        """Return a sample's ground truth, without reading its pictures."""
        with located(self.where(index)):
            return self._truth(dict(self.records[index]))

    def first(self, limit: int) -> "Samples":
        """Return the first `limit` samples, or all if there are fewer."""
        if isinstance(self.records, list):
            records = self.records[:limit]
        else:
            records = Picked([self.records], range(min(limit, len(self))))
        return Samples(self.benchmark, records, self.place)

    def missing_pictures(self) -> list[str]:
        """Return the ids of samples whose picture files do not exist.

        Published data sets, which bring their pictures, are not checked.
        """
        if not isinstance(self.records, list):
            return []
        return [
            id
            for id, record in zip(self.ids, self.records, strict=True)
            if any(
                isinstance(image, (str, os.PathLike))
                and not os.path.exists(image)
                for image in _listed(record.get("images"))
            )
        ]

    def _truth(self, record):
        truth = {
            name: value
            for name, value in record.items()
            if name not in ("id", "images")
        }
        if "answers" in truth:
            truth["answers"] = self._answers(truth["answers"])
        return truth

    def _answers(self, answers):
        """Return one or more reference answers as text in the answer form.

        An answer that is missing stays `None`.
        """
        if answers is None:
            return None
        if isinstance(answers, (list, tuple)):
            return [self._answers(answer) for answer in answers]
        text = str(int(answers)) if isinstance(answers, bool) else str(answers)
        text = self.benchmark.answer_words.get(text, text)
        form = self.benchmark.answer_form
        return form.format(text) if form and "answer is" not in text else text


def record_id(row: int, record: Mapping[str, Any]) -> str:
    """Return the id of a record, which is its row if it has none."""
    return str(row if record.get("id") is None else record["id"])


def check_unique(ids: Sequence[str], what: str) -> None:
    """Raise a `ValueError` that lists the ids that occur twice."""
    seen, duplicates = set(), []
    for id in ids:
        if id in seen:
            duplicates.append(id)
        seen.add(id)
    if duplicates:
        raise ValueError(
            f"{what} has {len(duplicates)} ids more than once. Expected: each "
            f"once. Received: {duplicates[:5]}."
        )


def _listed(images):
    return images if isinstance(images, (list, tuple)) else [images]


def _images(record, benchmark):
    """Return a sample's picture, its pictures, or its video, unopened."""
    images = record.get("images")
    if images is None:
        raise ValueError("The sample has no picture. Expected: 'images'.")
    if benchmark.pictures > 1 and (
        not isinstance(images, (list, tuple))
        or len(images) != benchmark.pictures
    ):
        raise ValueError(
            f"{benchmark.name} has {benchmark.pictures} pictures a prompt. "
            f"Received: {images!r:.80}."
        )
    return images


def _opened(sample, benchmark):
    """Pick frames of a sample's video; draw the box it asks about; turn it."""
    # Imported here, since reading pictures imports Keras.
    from keras_paligemma.evaluation.pictures import draw_red_box
    from keras_paligemma.evaluation.pictures import pick_frames
    from keras_paligemma.evaluation.pictures import turn

    if benchmark.frames is not None:
        return pick_frames(sample.images, benchmark.frames, benchmark.stride)
    if sample.truth.get("red_box") is not None:
        return draw_red_box(sample.images, sample.truth["red_box"])
    if sample.truth.get("turns") is not None:
        return turn(sample.images, sample.truth["turns"])
    return sample.images


def _prompt(template, record):
    """Fill a prompt template with the text of a record's fields."""

    def text_of(field):
        value = record.get(field)
        if isinstance(value, (list, tuple)):
            value = BETWEEN_OPTIONS.join(map(str, value))
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"The prompt {template!r} needs the field {field!r}. "
                f"Expected: text. Received: {value!r:.80}."
            )
        return value

    return fill(template, text_of)
