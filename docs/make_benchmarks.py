"""Writes `benchmarks.md` of the registry: `python docs/make_benchmarks.py`."""

import math
from pathlib import Path

from keras_paligemma.evaluation import benchmarks
from keras_paligemma.evaluation.registry import COLUMNS

FILE = Path(__file__).parent / "benchmarks.md"

# What `tests/evaluation/test_offline.py` proves each kind of task on.
PROOFS = {
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

Every row of PaliGemma 2's model card as one command:

<!-- not run: needs the data of TextVQA -->
```bash
keras-paligemma finetune --benchmark textvqa --preset … --data DIR --output RUN
keras-paligemma evaluate --benchmark textvqa --preset RUN/preset --data DIR
keras-paligemma benchmarks show textvqa
```

The card's numbers are of models that were fine-tuned for each task, at full
size; they are the card's and nothing here measured them. `--data` takes the
official archive where the table says so, unpacked; TensorFlow Datasets' folder
of the given name, as the original's builders make it; what
`datasets.Dataset.save_to_disk` wrote; or, for every benchmark, a folder with
`samples.jsonl`, a line a sample: `id`, `images` (a path, or a list) and the
fields of the last column.

A run that was killed goes on by the same command: predictions are on the disk
batch by batch. Its report puts ours, with a bootstrap interval of 95 %, beside
the card's.

What to know before comparing:

- Prompts of the additional benchmarks are ours; the original has none.
- Captions are cut into words without Java; `caption_tokens` says how much that
  changes. Strings that Java has cut go in with `tokenize=False`.
- RefCOCO's masks are read and learned in the codes of a codec: `--masks
  vae-oid.npz` for published sizes, the embedded one for the nano preset.
- A video is a folder of frames or an animated picture; films are cut by
  `ffmpeg`.
- Values with "needs a judge" are decided by people or another model:
  `evaluate(…, judges={…})`.
- On several hosts each runs the same command with `--multi-host`.

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
    text += "## Data, prompts and proofs\n\n"
    text += table(
        ["`--benchmark`", "data", "split", "prompt", "proof", "fields"],
        [
            [
                f"`{benchmark.name}`",
                data_of(benchmark),
                benchmark.subset
                and f"{benchmark.subset} {benchmark.split}"
                or benchmark.split,
                f"`{benchmark.prompt!r}`",
                PROOFS[benchmark.kind],
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
