"""Writes `benchmarks.md` of the registry: `python docs/make_benchmarks.py`."""

import math
from pathlib import Path

from keras_paligemma.evaluation import benchmarks
from keras_paligemma.evaluation.registry import COLUMNS

FILE = Path(__file__).parent / "benchmarks.md"

# The data of `tests/evaluation/test_offline.py`, by kind of task.
TEST_DATA = {
    "caption": "scenes of sprites",
    "chart": "bars by matplotlib",
    "choice": "scenes of sprites, four names",
    "count": "scenes of sprites",
    "molecule": "drawings by RDKit",
    "music": "scores by verovio",
    "object": "boxes and masks on drawn pictures",
    "pair": "pairs of scenes",
    "question": "easy-vqa",
    "reading": "rendered text",
    "table": "rendered tables",
    "video": "short clips",
    "words": "rendered words at known places",
}

HEAD = """# Benchmarks of the model card

Made from `keras_paligemma/evaluation/benchmarks.toml` by
`python docs/make_benchmarks.py`; do not edit.

One command evaluates any row of PaliGemma 2's model card:

<!-- not run: needs the data of TextVQA -->
```bash
keras-paligemma finetune --benchmark textvqa --preset … --data DIR --output RUN
keras-paligemma evaluate --benchmark textvqa --preset RUN/preset --data DIR
keras-paligemma benchmarks show textvqa
```

`finetune --benchmark` trains all weights of a `pt` preset with the original's
settings. Options override them: `--lora-rank 8 --learning-rate 0.0001` trains
an adapter; then evaluate with `--adapter RUN/adapter`.

The tables give the model card's numbers, for models that were fine-tuned for
each task at full size. This project did not measure them.

`--data` takes one of:

- the official archive, unpacked, if the table says "archive";
- the TensorFlow Datasets folder of the given name, as made by the original's
  builders;
- the output of `datasets.Dataset.save_to_disk`;
- for every benchmark, a folder with `samples.jsonl`. Each line is a sample with
  `id`, `images` (a path or a list) and the fields of the last column.

Predictions are written to disk batch by batch, so the same command resumes a
killed run. The report compares the measured value and its 95 % bootstrap
interval with the card's value.

Before you compare:

- The prompts of the additional benchmarks are this project's. The original has
  none.
- Captions are tokenized without Java; `caption_tokens` describes the
  differences. For strings that Java has tokenized, pass `tokenize=False`.
- RefCOCO's masks are encoded by a mask codec. Published sizes need `--masks
  vae-oid.npz`. The nano preset uses the embedded codec.
- Some of TextVQA's pictures lie on their side. They are turned, as in the
  original, if OpenImages' `train-images-boxable-with-rotation.csv` is in the
  archive, as `train_images/rotation.csv`; for the split test,
  `test-images-with-rotation.csv` as `test_images/rotation.csv`.
- A video is a folder of frames or an animated picture. Cut films with `ffmpeg`.
- Values with "needs a judge" are decided by people or another model, passed as
  `evaluate(…, judges={…})`.
- On several hosts, each host runs the same command with `--multi-host`.

"""

TESTED = """The official data cannot be part of the tests. They run each kind
of task, from data to report, on the data in the column "tested on".

"""


def number(value):
    return "-" if math.isnan(value) else f"{value:g}"


def data_of(one):
    named = []
    if one.layout:
        named.append("archive")
    if one.tfds:
        named.append(f"TFDS `{one.tfds}`")
    if one.hugging_face:
        named.append(f"Hugging Face `{one.hugging_face}`")
    return f"{one.data}; {', '.join(named) or 'samples.jsonl'}"


def row(cells):
    return f"| {' | '.join(cells)} |\n"


def table(heads, rows):
    lines = [row(heads), row(["---"] * len(heads)), *map(row, rows)]
    return "".join(lines) + "\n"


def page():
    """Make the whole page: a str."""
    every = benchmarks().values()
    plain = [
        benchmark
        for benchmark in every
        if benchmark.card[benchmark.value].keys() == set(COLUMNS)
    ]
    other = [benchmark for benchmark in every if benchmark not in plain]
    text = HEAD + "## Results by resolution and size\n\n"
    text += table(
        ["`--benchmark`", "card", "metric, value", *COLUMNS],
        [
            [
                f"`{benchmark.name}`",
                benchmark.title,
                f"{benchmark.metric}, {benchmark.value}",
                *(
                    number(benchmark.card[benchmark.value][name])
                    for name in COLUMNS
                ),
            ]
            for benchmark in plain
        ],
    )
    text += "## Additional benchmarks\n\n"
    text += table(
        ["`--benchmark`", "card", "metric", "value", "3B", "10B"],
        [
            [
                f"`{benchmark.name}`" if not at else "",
                benchmark.title if not at else "",
                benchmark.metric if not at else "",
                f"{value} (needs a judge)"
                if value in benchmark.judges
                else value,
                *(number(numbers.get(n, math.nan)) for n in ("3B", "10B")),
            ]
            for benchmark in other
            for at, (value, numbers) in enumerate(benchmark.card.items())
        ],
    )
    text += "## Data and prompts\n\n"
    text += TESTED
    text += table(
        ["`--benchmark`", "data", "split", "prompt", "tested on", "fields"],
        [
            [
                f"`{benchmark.name}`",
                data_of(benchmark),
                benchmark.subset
                and f"{benchmark.subset} {benchmark.split}"
                or benchmark.split,
                f"`{benchmark.prompt!r}`",
                TEST_DATA[benchmark.kind],
                ", ".join(
                    f for f in benchmark.fields if f not in ("id", "images")
                ),
            ]
            for benchmark in every
        ],
    )
    return text.rstrip("\n") + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
