"""The benchmarks as data: one record a row of the model card."""

import dataclasses
import difflib
import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("224-3B", "224-10B", "224-28B", "448-3B", "448-10B", "448-28B")
_FILE = Path(__file__).parent / "benchmarks.toml"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What it takes to run one row of the model card.

    Args:
        name: str, as the command line takes it.
        task: str, the task that rows share.
        title: str, the row of the card.
        kind: str, the kind of task, such as "question" or "chart".
        prompt: str, in which `{field}` stands for a field of the sample.
        metric: str, a function of `keras_paligemma.metrics`.
        value: str, which of the metric's values the card reports.
        split: str, which part of the data; `{language}` where each language
            has one.
        text_length: int, tokens of the longest prompt, and of the longest
            answer, as the original pads them.
        fields: dict of what we call a field to its path in a published data
            set.
        data: str, where to get the data.
        card: dict of a value to a dict of a column to the card's number; nan
            where the card has none.
        scale: number that makes ours comparable with the card's.
        arguments: dict, for the metric.
        response: str, the field that a fine-tune learns to answer, or `None`
            where that takes more than the data.
        lower_answers: bool, whether a fine-tune learns them in lower case.
        train_split: str or `None`.
        layout: str, the reader of the official archive, or `None`.
        subset: str, the part of the archive that is scored, or `None`.
        tfds: str, the original's name of the data set, or `None`.
        tfds_split: str, where the original calls the split otherwise.
        hugging_face: str, a data set of the hub, or `None`.
        pictures: int, pictures of one prompt.
        frames: int, frames of a video, or `None`.
        stride: int, from one frame to the next.
        beams: int; 1 decodes greedily.
        languages: tuple of str, the languages that count, or none.
        average_over: str, a field: the metric is computed for each of its
            values, and the mean of these reported.
        answer_form: str, what right answers are put into, or `None`.
        answer_words: dict of a right answer to the word for it.
        judges: tuple of values that need a judge, see `metrics.judged`.
        finetune: dict, settings of the transfer; under "448" what differs.
    """

    name: str
    task: str
    title: str
    kind: str
    prompt: str
    metric: str
    split: str
    text_length: int
    fields: Mapping[str, Any]
    data: str
    card: Mapping[str, Mapping[str, float]]
    value: str = "acc"
    scale: float = 100
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    response: str | None = None
    lower_answers: bool = False
    train_split: str | None = None
    layout: str | None = None
    subset: str | None = None
    tfds: str | None = None
    tfds_split: str | None = None
    hugging_face: str | None = None
    pictures: int = 1
    frames: int | None = None
    stride: int | None = None
    beams: int = 1
    languages: tuple[str, ...] = ()
    average_over: str | None = None
    answer_form: str | None = None
    answer_words: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judges: tuple[str, ...] = ()
    finetune: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pictures_of_a_prompt(self) -> int:
        """Count the pictures, or the frames of a video, of one prompt."""
        return self.frames or self.pictures

    def card_numbers(self, column: str | None) -> dict[str, float]:
        """Return the card's numbers for a model.

        Args:
            column: str, one of `COLUMNS`, or `None`.

        Returns:
            Dict of a value to a number, of those that the card has. The
            additional benchmarks name a size and no resolution.
        """
        if column is None:
            return {}
        names = (column, column.partition("-")[2])
        found = {}
        for value, numbers in self.card.items():
            for name in names:
                if name in numbers and not math.isnan(numbers[name]):
                    found[value] = numbers[name]
        return found


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Read all records.

    Returns:
        Dict of names to `Benchmark`, in the order of the file.

    Example:

    >>> benchmarks()["textvqa"].prompt
    'answer en {question}'
    """
    found = {}
    with open(_FILE, "rb") as file:
        tasks = tomllib.load(file)
    for task, shared in tasks.items():
        rows = shared.pop("rows")
        for name, own in rows.items():
            fields = {"name": name, "task": task} | shared | own
            fields["languages"] = tuple(fields.get("languages", "").split())
            fields["judges"] = tuple(fields.get("judges", ()))
            if isinstance(fields["card"], list):
                numbers = zip(COLUMNS, fields["card"], strict=True)
                value = fields.get("value", Benchmark.value)
                fields["card"] = {value: dict(numbers)}
            found[name] = Benchmark(**fields)
    return found


def find_benchmark(name: str | Benchmark) -> Benchmark:
    """Find a record by its name.

    Args:
        name: str, where "-" and capitals do not matter; or a `Benchmark`,
            which is given back.

    Raises:
        ValueError: there is none, with the nearest names.

    Example:

    >>> find_benchmark("RefCOCO-testA").title
    'RefCOCO (testA)'
    """
    if isinstance(name, Benchmark):
        return name
    known = benchmarks()
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, 3, 0.5)
    near += [
        name for name in known if name.startswith(plain) and name not in near
    ]
    raise ValueError(
        f"There is no benchmark {name!r}. "
        + (f"The nearest: {', '.join(near)}. " if near else "")
        + "`keras-paligemma benchmarks` lists all."
    )
