"""The folder of an evaluation: what its answers are of, and who may resume."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_paligemma import compat
from keras_paligemma.atomic import whole_file
from keras_paligemma.config import read_json
from keras_paligemma.evaluation.registry import Benchmark
from keras_paligemma.evaluation.run_record import RunRecord
from keras_paligemma.evaluation.run_record import describe_image
from keras_paligemma.evaluation.run_record import describe_model
from keras_paligemma.evaluation.run_record import plain
from keras_paligemma.evaluation.samples import Samples


def record_of(benchmark: Benchmark, samples: Samples, model: Any) -> RunRecord:
    """Return what the answers of an evaluation depend on.

    Every prompt is filled, so one that lacks a field is found here. Every
    process must call this, see `describe_model`.

    Args:
        benchmark: `Benchmark`.
        samples: `Samples`.
        model: `PaliGemmaCausalLM`.

    Raises:
        ValueError: a sample has no picture, or lacks a field of the prompt;
            the message names its id.
    """
    listed = hashlib.sha256("\n".join(samples.ids).encode()).hexdigest()
    settings = {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "samples": len(samples),
        "ids_sha256": listed,
        "frames": benchmark.frames,
        "stride": benchmark.stride,
        "beams": benchmark.beams,
        "max_new_tokens": benchmark.text_length,
        **describe_model(model),
    }
    rows = [_asked(samples.unopened(row)) for row in range(len(samples))]
    return RunRecord(settings, rows)


def _asked(sample):
    """Return the picture and prompt of a sample, ready for JSON."""
    image = describe_image(sample.images)
    changes = [sample.truth.get(name) for name in ("red_box", "turns")]
    made = [plain(value) for value in changes if value is not None]
    return [[image, *made] if made else image, sample.prompt]


def claim_folder(output: Path, here: Mapping[str, Any]) -> None:
    """Write the settings of a run to its folder.

    Args:
        output: `pathlib.Path`, the folder, which is created if it is missing.
        here: dict of settings, ready for JSON.

    Raises:
        ValueError: the folder holds an evaluation with other settings.
    """
    path = output / "settings.json"
    if path.is_file():
        there = read_json(path)
        changed = {
            name: (there.get(name), value)
            for name, value in here.items()
            if there.get(name) != value
        }
        if changed:
            raise ValueError(
                f"{output} holds an evaluation of another kind. Received "
                f"(there, now): {changed}. Choose another output."
            )
    output.mkdir(parents=True, exist_ok=True)
    if compat.process()[0]:
        return
    with whole_file(path) as draft:
        draft.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")
