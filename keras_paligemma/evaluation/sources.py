"""Where a benchmark's samples come from: folders and published data sets."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_paligemma.evaluation.layouts import LAYOUTS
from keras_paligemma.evaluation.layouts import read_json_lines
from keras_paligemma.evaluation.records import Mapped
from keras_paligemma.evaluation.records import Picked
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.samples import Samples
from keras_paligemma.evaluation.selection import check_split
from keras_paligemma.evaluation.selection import selected

# The file of our own layout, which any benchmark can be stored in.
OWN = "samples.jsonl"


def open_samples(
    benchmark: Benchmark, source: Any, split: str | None = None
) -> Samples:
    """Open the samples of a benchmark.

    Args:
        benchmark: `Benchmark`.
        source: a folder that holds one of
            - `samples.jsonl`: one sample per line with `id`, `images` (a path
              relative to the folder, or a list) and the benchmark's fields;
            - the unpacked official archive, if there is a reader for it;
            - the output of `datasets.Dataset.save_to_disk`;
            - TensorFlow Datasets' data under the original's name;
            or a data set in memory with the published fields; or `Samples`
            of the same benchmark, which are returned unchanged.
        split: str, name of a split; the benchmark's if `None`. Only archives
            and TensorFlow Datasets have several.

    Returns:
        `Samples`. If records have a `language` or, for ChartQA, `kinds`, they
        are those that the benchmark scores.

    Raises:
        ValueError: the source is none of these, and the message says where to
            get the data; it has no such split; or a language or kind lacks.

    Example:

    ```python
    samples = open_samples(find_benchmark("textvqa"), "TextVQA")
    samples[0].prompt  # "answer en what brand is this?"
    ```
    """
    if isinstance(source, Samples):
        if source.benchmark.name != benchmark.name:
            raise ValueError(
                f"{source.place} was opened for another benchmark. Expected: "
                f"samples of {benchmark.name}. Received: samples of "
                f"{source.benchmark.name}."
            )
        check_split(source.benchmark, split, source.place)
        return source
    if not isinstance(source, (str, os.PathLike)):
        place = type(source).__name__
        check_split(benchmark, split, place)
        records = selected(benchmark, _in_memory(benchmark, source), place)
        return Samples(benchmark, records, place)
    folder = Path(os.path.expanduser(source))
    if not folder.is_dir():
        raise ValueError(
            "The data folder does not exist. Expected: a folder. Received: "
            f"{os.fspath(source)!r}. Get the data of {benchmark.name} from "
            f"{benchmark.data}."
        )
    split = split or benchmark.split
    records = _records(benchmark, folder, split)
    records = selected(benchmark, records, folder)
    opened = dataclasses.replace(benchmark, split=split)
    return Samples(opened, records, os.fspath(folder))


def _records(benchmark, folder, split):
    if (folder / OWN).is_file():
        check_split(benchmark, split, folder / OWN)
        return _own(folder)
    if (folder / "state.json").is_file():
        check_split(benchmark, split, folder)
        return _hugging_face(benchmark, folder)
    tfds_name = benchmark.tfds or ""
    if tfds_name and (folder / tfds_name.partition("/")[0]).is_dir():
        return _tfds(benchmark, folder, split)
    if benchmark.layout is not None:
        return LAYOUTS[benchmark.layout](folder, split, benchmark.subset)
    named = [f"{OWN}, a line a sample", "what `Dataset.save_to_disk` wrote"]
    if tfds_name:
        named.append(f"TensorFlow Datasets' {tfds_name!r}")
    raise ValueError(
        f"{folder} holds no data of {benchmark.name}. Expected one of: "
        f"{'; '.join(named)}. Received: {sorted(os.listdir(folder))[:5]}. Get "
        f"the data from {benchmark.data}."
    )


def _own(folder):
    """Read our own layout; paths of pictures are relative to the folder."""
    records = []
    for place, record in read_json_lines(folder / OWN):
        if not isinstance(record, dict) or "images" not in record:
            raise ValueError(
                f"{place}: a sample has `images`. Received: {record!r:.80}."
            )
        images = record["images"]
        several = isinstance(images, list)
        named = images if several else [images]
        if not named or not all(isinstance(each, str) for each in named):
            raise ValueError(
                f"{place}: `images` is a path or a list of paths. Received: "
                f"{images!r:.80}."
            )
        paths = [str(folder / image) for image in named]
        records.append(record | {"images": paths if several else paths[0]})
    return records


def _hugging_face(benchmark, folder):
    """Open a data set saved by Hugging Face's `datasets`."""
    import datasets

    found = datasets.load_from_disk(folder)
    if isinstance(found, dict):
        raise ValueError(
            f"{folder} holds several splits. Expected: the folder of one. "
            f"Received: {sorted(found)}."
        )
    return _mapped(benchmark, found)


def _mapped(benchmark, dataset):
    """Return the records of a data set, with the benchmark's field names.

    ChartQA's `kinds`, which the published data lack, are kept under this name.
    """
    dataset = _undecoded(benchmark, dataset)
    fields = benchmark.fields
    if benchmark.task == "chartqa" and len(dataset) and "kinds" in dataset[0]:
        fields = {**fields, "kinds": "kinds"}
    return Mapped(dataset, fields)


def _undecoded(benchmark, found):
    """Keep pictures of Hugging Face's data sets encoded until they are used.

    Otherwise reading an id or an answer would decode a picture.
    """
    if not hasattr(found, "cast_column"):
        return found
    for path in _pictures(benchmark):
        feature = found.features.get(path)
        if type(feature).__name__ == "Image":
            found = found.cast_column(path, type(feature)(decode=False))
    return found


def _tfds(benchmark, folder, split):
    """Open TensorFlow Datasets' files, of all languages if split by language.

    ChartQA's kinds are a data set each; both are read if none is named.
    Pictures stay encoded, so that reading ids and answers is cheap.
    """
    import tensorflow_datasets as tfds

    if split == benchmark.split:
        split = benchmark.tfds_split or split
    fields = dict(benchmark.fields)
    opened = [(benchmark.tfds, split, {})]
    if "{language}" in split:
        opened = [
            (benchmark.tfds, split.format(language=code), {"language": code})
            for code in benchmark.languages
        ]
    elif benchmark.task == "chartqa" and benchmark.subset is None:
        opened = [
            (f"chartqa/{kind}", split, {"kinds": kind})
            for kind in ("human", "augmented")
        ]
        # Each kind counts its own from 0.
        del fields["id"]
    decoders = {
        path: tfds.decode.SkipDecoding() for path in _pictures(benchmark)
    }
    parts = [
        Mapped(
            tfds.data_source(
                name, split=part, data_dir=folder, decoders=decoders
            ),
            fields,
        )
        for name, part, _ in opened
    ]
    return Picked(parts, shared=[shared for _, _, shared in opened])


def _pictures(benchmark):
    """Return the paths of a data set's picture fields."""
    if benchmark.frames:
        return []
    paths = benchmark.fields["images"]
    return paths if isinstance(paths, list) else [paths]


def _in_memory(benchmark, dataset):
    if (
        isinstance(dataset, Mapping)
        or not hasattr(dataset, "__len__")
        or not hasattr(dataset, "__getitem__")
    ):
        raise ValueError(
            "The data set cannot be asked for a sample by number. Expected: a "
            "folder, a split of `datasets.load_dataset`, `tfds.data_source`, "
            f"or a list. Received: {type(dataset).__name__}."
        )
    return _mapped(benchmark, dataset)
