"""Samples of a benchmark: pictures, a prompt, and what is right."""

import bisect
import dataclasses
import itertools
import os
import re
import string
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageSequence

from keras_paligemma.data.examples import located
from keras_paligemma.evaluation.registry import Benchmark

# What lists of choices in a prompt are joined by, as the original does.
_BETWEEN_CHOICES = " \t "
_PATH = re.compile(r"([^.\[\]]+)(?:\[([^\[\]]+)\])?")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        id: str, unique in its split.
        images: a picture, or a list of pictures or frames.
        prompt: str.
        truth: dict of the fields that a metric or a fine-tune asks for.
    """

    id: str
    images: Any
    prompt: str
    truth: Mapping


class Samples:
    """Samples of a benchmark, each made when it is asked for.

    Args:
        benchmark: `Benchmark`.
        records: sequence of dictionaries with the benchmark's fields: `id`,
            `images`, those of the prompt, and those that are right.
        place: str, what an error calls the data.

    Raises:
        ValueError: there are none, or ids that two have.
    """

    def __init__(
        self, benchmark: Benchmark, records: Sequence[Mapping], place: str
    ):
        if not len(records):
            raise ValueError(
                f"{place} has no samples for {benchmark.name}, split "
                f"{benchmark.split!r}. Expected: one or more."
            )
        self.benchmark = benchmark
        self.place = place
        self.records = records
        self.ids = [
            str(row if record.get("id") is None else record["id"])
            for row, record in enumerate(records)
        ]
        check_unique(self.ids, f"{place}, split {benchmark.split!r},")

    def __len__(self):
        return len(self.records)

    def where(self, index: int) -> str:
        """Name the place of a sample by its id."""
        return f"{self.place}, id {self.ids[index]!r}"

    def __getitem__(self, index: int) -> Sample:
        with located(self.where(index)):
            record = dict(self.records[index])
            return Sample(
                self.ids[index],
                _images(record, self.benchmark),
                _fill(self.benchmark.prompt, record),
                self._truth(record),
            )

    def truth(self, index: int) -> dict:
        """Give what is right of a sample, without its pictures."""
        with located(self.where(index)):
            return self._truth(dict(self.records[index]))

    def first(self, limit: int) -> "Samples":
        """Give the first samples alone, at most so many."""
        if isinstance(self.records, list):
            records = self.records[:limit]
        else:
            records = Picked([self.records], range(min(limit, len(self))))
        return Samples(self.benchmark, records, self.place)

    def missing_pictures(self) -> list[str]:
        """List the ids whose pictures are paths to nothing.

        Records of data sets that decode their pictures are not looked at.
        """
        if not isinstance(self.records, list):
            return []
        return [
            id
            for id, record in zip(self.ids, self.records, strict=True)
            if any(
                isinstance(one, (str, os.PathLike)) and not os.path.exists(one)
                for one in _listed(record.get("images"))
            )
        ]

    def _truth(self, record):
        truth = {
            name: value
            for name, value in record.items()
            if name not in ("id", "images")
        }
        if truth.get("answers") is not None:
            truth["answers"] = self._answers(truth["answers"])
        return truth

    def _answers(self, answers):
        """Give one right answer or several as text, in the form asked for."""
        if isinstance(answers, (list, tuple)):
            return [self._answers(one) for one in answers]
        text = str(int(answers)) if isinstance(answers, bool) else str(answers)
        text = self.benchmark.answer_words.get(text, text)
        form = self.benchmark.answer_form
        return form.format(text) if form and "answer is" not in text else text


def check_unique(ids: Sequence[str], what: str) -> None:
    """Refuse ids that occur twice, and name them."""
    seen, twins = set(), []
    for one in ids:
        if one in seen:
            twins.append(one)
        seen.add(one)
    if twins:
        raise ValueError(
            f"{what} has {len(twins)} ids more than once. Expected: each once. "
            f"Received: {twins[:5]}."
        )


class Mapped(Sequence):
    """Records of a published data set, whose fields get our names.

    Args:
        dataset: of Hugging Face, TensorFlow Datasets, or a list: an object of
            a length and of `[index]`, which gives dictionaries.
        fields: dict of our names to paths; of pictures a list of paths where
            a prompt has several.
    """

    def __init__(self, dataset: Any, fields: Mapping):
        self.dataset = dataset
        self.fields = fields

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no record {index} of {len(self)}.")
        example = self.dataset[int(index)]
        return {
            name: [at_path(example, one) for one in path]
            if isinstance(path, list)
            else at_path(example, path)
            for name, path in self.fields.items()
        }


class Picked(Sequence):
    """Some records of several sequences, read when they are asked for.

    Args:
        parts: sequences of records.
        rows: numbers in all of them together; `None` takes all.
        shared: dicts of fields that all records of a part have, one a part.
    """

    def __init__(self, parts, rows=None, shared=None):
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))
        self.rows = range(self.ends[-1]) if rows is None else rows
        self.shared = shared or [{}] * len(parts)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        part = bisect.bisect_right(self.ends, row)
        first = self.ends[part] - len(self.parts[part])
        return self.shared[part] | self.parts[part][row - first]


def at_path(example: Mapping, path: str) -> Any:
    """Follow a path into an example.

    A name that has a slash or a full stop in itself, as TFDS's "image/id",
    goes before its parts. Of a list of structures, or a structure of lists,
    the parts are listed. "choices[answer]" takes the entry of a list that
    another field numbers.

    Args:
        example: dict.
        path: str.

    Returns:
        Python values in place of bytes and NumPy's scalars and lists; arrays
        of more dimensions, which are pictures, as they are.

    Raises:
        ValueError: there is no such field, with those that there are.

    Example:

    >>> at_path({"answers": [{"answer": b"cat"}]}, "answers.answer")
    ['cat']
    >>> at_path({"choices": ["a", "b"], "n": 1}, "choices[n]")
    'b'
    """
    if path in example:
        return _plain(example[path])
    head, _, rest = path.partition(".")
    found = _PATH.fullmatch(head)
    name, index = found.groups() if found else (head, None)
    if "/" in name and name not in example:
        outer, _, inner = name.partition("/")
        name, rest = outer, ".".join(filter(None, (inner, rest)))
    if name not in example:
        raise ValueError(
            f"There is no field {path!r}. Expected: one of {sorted(example)}."
        )
    value = example[name]
    if index is not None:
        value = _plain(value)[int(at_path(example, index))]
    if not rest:
        return _plain(value)
    if isinstance(value, Mapping):
        return at_path(value, rest)
    return [at_path(one, rest) for one in value]


def _plain(value):
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value  # An encoded picture.
    if isinstance(value, Mapping) and {"bytes", "path"} >= value.keys():
        return value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray) and value.ndim <= 1:
        value = value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _listed(images):
    return images if isinstance(images, (list, tuple)) else [images]


def _images(record, benchmark):
    """Give a sample's picture, its pictures, or frames of its video."""
    images = record.get("images")
    if images is None:
        raise ValueError("The sample has no picture. Expected: 'images'.")
    if benchmark.frames is not None:
        return pick_frames(images, benchmark.frames, benchmark.stride)
    if benchmark.pictures > 1 and (
        not isinstance(images, (list, tuple))
        or len(images) != benchmark.pictures
    ):
        raise ValueError(
            f"{benchmark.name} has {benchmark.pictures} pictures a prompt. "
            f"Received: {images!r:.80}."
        )
    if record.get("red_box") is not None:
        return draw_red_box(images, record["red_box"])
    return images


def pick_frames(video: Any, count: int, stride: int) -> list:
    """Take frames of a video: the first, and every so many behind it.

    Of a video that is too short the frames that it has are repeated from its
    beginning, as the original does.

    Args:
        video: list of frames, array (frames, height, width, 3), path of a
            folder of pictures, whose order is that of their names, or of an
            animated picture (GIF, WebP, APNG).
        count: int.
        stride: int.

    Returns:
        List of `count` pictures.

    Raises:
        ValueError: there is no frame, or the file is a film, which another
            program has to cut into pictures.

    Example:

    >>> pick_frames(["a", "b", "c"], 3, 2)
    ['a', 'c', 'a']
    """
    frames = _frames(video)
    picked = [frames[at] for at in range(0, len(frames), stride)][:count]
    if not picked:
        raise ValueError(f"The video has no frames. Received: {video!r:.80}.")
    return [picked[at % len(picked)] for at in range(count)]


def _frames(video):
    if not isinstance(video, (str, os.PathLike)):
        return list(video)
    if os.path.isdir(video):
        return [
            os.path.join(video, name)
            for name in sorted(os.listdir(video))
            if not name.startswith(".")
        ]
    try:
        with Image.open(video) as opened:
            frames = ImageSequence.Iterator(opened)
            return [frame.convert("RGB") for frame in frames]
    except OSError as error:
        raise ValueError(
            "The video cannot be read as pictures. Expected: a folder of "
            "frames, or an animated picture. Received: "
            f"{os.fspath(video)!r}. Cut it by `ffmpeg -i FILM "
            "FOLDER/%06d.jpg`."
        ) from error


def draw_red_box(image: Any, box: Sequence[float]) -> Image.Image:
    """Mark a part of a picture, as WidgetCap's prompts do.

    Args:
        image: as `read_image` takes it.
        box: (y1, x1, y2, x2) as shares of the picture.

    Returns:
        `PIL.Image.Image`, with a line that is a pixel wide once the picture
        is 224 pixels.
    """
    from keras_paligemma.preprocessing.images import read_image

    picture = Image.fromarray(read_image(image))
    width, height = picture.size
    y1, x1, y2, x2 = box
    edges = [x1 * width, y1 * height, x2 * width, y2 * height]
    line = max(1, round(max(picture.size) / 224))
    ImageDraw.Draw(picture).rectangle(edges, outline="red", width=line)
    return picture


def _fill(template: str, record: Mapping) -> str:
    """Put the text of fields in the place of their names."""
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if field is None:
            continue
        value = record.get(field)
        if isinstance(value, (list, tuple)):
            value = _BETWEEN_CHOICES.join(map(str, value))
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"The prompt {template!r} needs the field {field!r}. "
                f"Expected: text. Received: {value!r:.80}."
            )
        parts.append(value)
    return "".join(parts)
