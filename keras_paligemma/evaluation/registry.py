"""The benchmarks as data: one record per row of the model card."""

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
    """Everything needed to run one row of the model card.

    Args:
        name: str, name on the command line.
        task: str, task, which several rows may share.
        title: str, the row's title on the card.
        kind: str, kind of task, such as "question" or "chart".
        prompt: str, template in which `{field}` is a field of the sample.
        metric: str, name of a function of `keras_paligemma.metrics`.
        value: str, the metric's value that the card reports.
        split: str, split of the data; contains `{language}` if each language
            has its own.
        text_length: int, tokens; longest prompt and longest response, as the
            original pads them.
        fields: dict of our field names to paths in a published data set.
        data: str, where to get the data.
        card: dict of values to dicts of columns to the card's numbers; nan
            where the card has none.
        scale: float, factor from the metric's value to the card's unit.
        arguments: dict, keyword arguments of the metric.
        response: str, field that holds the target text of a fine-tune; `None`
            if the data does not contain it.
        lower_answers: bool, whether that text is lowered.
        train_split: str, split for training, or `None`.
        layout: str, reader of the official archive, or `None`.
        subset: str, part of the archive that is scored, or `None`.
        tfds: str, the original's name in TensorFlow Datasets, or `None`.
        tfds_split: str, the split's name there, if it differs.
        tfds_train_split: str, that of the training split, if it differs.
        hugging_face: str, name of a data set on the hub, or `None`.
        pictures: int, pictures per prompt.
        frames: int, frames per video, or `None`.
        stride: int, distance between sampled frames, in frames.
        beams: int, number of beams; 1 decodes greedily.
        languages: tuple of str, languages that are scored; empty for all.
        average_over: str, a field; the metric is computed for each of its
            values, and their mean is reported.
        answer_form: str, template of reference answers, or `None`.
        answer_words: dict of reference answers to words that replace them.
        judges: tuple of str, values that need a judge, see `metrics.judged`.
        finetune: dict, settings of the transfer; "448" holds what differs at
            448 pixels.
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
    tfds_train_split: str | None = None
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
        """Return the number of pictures, or video frames, of one prompt."""
        return self.frames or self.pictures

    def card_numbers(self, column: str | None) -> dict[str, float]:
        """Return the card's numbers for a model.

        Args:
            column: str, one of `COLUMNS`, or `None`.

        Returns:
            dict of values to numbers, without those that the card lacks. For
            the card's additional benchmarks a column is a size, without the
            resolution.
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
        dict of names to `Benchmark`, in the order of the file.

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
        name: str, in which "-", "_" and spaces are the same, as are upper and
            lower case; or a `Benchmark`, which is returned unchanged.

    Returns:
        `Benchmark`.

    Raises:
        ValueError: the name is unknown; the message lists similar names.

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
