"""What a run is made of, kept beside its answers: only it may resume."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_paligemma import compat
from keras_paligemma.atomic import whole_file
from keras_paligemma.config import parse_json
from keras_paligemma.preprocessing.images import is_uri
from keras_paligemma.preprocessing.images import picture_path

# Largest weight, in values, that a model's fingerprint includes as a whole.
_SMALL = 2**20
_OF_A_ROW = ("image", "prompt")


class RunRecord:
    """The settings of a run, and the picture and prompt of each row.

    It is on the disk before the first row, as `PATH.run.json`, so that every
    row of the file at `PATH` has a record, whenever the run was killed. Rows
    that follow those of the file may change: input that has grown resumes.

    Args:
        settings: dict, ready for JSON.
        rows: list of [image, prompt], ready for JSON, one per row of the file.
    """

    def __init__(
        self, settings: Mapping[str, Any], rows: Sequence[Sequence[Any]]
    ) -> None:
        self.settings = settings
        self.rows = rows

    def part(self, rows: Sequence[int]) -> "RunRecord":
        """Return the record of a file that holds only some rows."""
        return RunRecord(self.settings, [self.rows[row] for row in rows])

    def check(self, path: Path, ids: Sequence[str]) -> None:
        """Raise unless the rows of a file are of this run.

        Args:
            path: path of the file of predictions.
            ids: list of str, ids of the rows that it holds.

        Raises:
            ValueError: there is no record, or it differs.
        """
        place = record_path(path)
        there = _read(place)
        if there is None:
            raise ValueError(
                f"{path} holds rows of another run, or of an earlier version. "
                f"Expected: {place.name} beside it, which says what they are "
                "of. Received: no such file. Choose another output, or remove "
                f"{path.name}."
            )
        changed = _changes(there.settings, self.settings)
        if changed:
            raise _another_run(path, changed)
        for row, id in enumerate(ids):
            # A row that a record lacks is `None`.
            old, new = (
                dict(zip(_OF_A_ROW, *record.rows[row : row + 1], strict=False))
                for record in (there, self)
            )
            if old != new:
                raise _another_run(path, _changes(old, new), f" of id {id!r}")

    def write(self, path: Path) -> None:
        """Write the record of a file of predictions, all or nothing."""
        place = record_path(path)
        there = _read(place)
        here = {"settings": self.settings, "rows": self.rows}
        if there is not None and vars(there) == here:
            return
        with whole_file(place) as draft:
            draft.write_text(json.dumps(here) + "\n", encoding="utf-8")


def record_path(path: Path) -> Path:
    """Return the path of the record of a file of predictions."""
    return path.with_name(f"{path.name}.run.json")


def describe_model(model: Any) -> dict[str, Any]:
    """Return what answers depend on in a model, ready for JSON.

    Every process must call this, see `fingerprint`.

    Args:
        model: `PaliGemmaCausalLM`.
    """
    converter = model.preprocessor.image_converter
    return {
        "model_sha256": fingerprint(model),
        "image_size": model.backbone.image_size,
        "resize": converter and converter.resize,
        "compute_dtype": model.backbone.compute_dtype,
        "sampler": type(model.sampler).__name__,
        "sampler_config": plain(model.sampler.get_config()),
    }


def fingerprint(model: Any) -> str:
    """Hash a model's small weights, and a part of each large one.

    Training changes norms and biases, or adapters, and even those of a 28b
    model are only megabytes. A merged adapter changes all of a kernel, whose
    first row is enough. Every process must call this, since shards are
    gathered.

    Args:
        model: `PaliGemmaCausalLM`.

    Returns:
        str, a hash in hexadecimal.
    """
    found = hashlib.sha256()
    for part in model.backbone.weights:
        while math.prod(part.shape) > _SMALL:
            part = part[0]
        found.update(compat.to_host(part).astype("float32").tobytes())
    return found.hexdigest()


def plain(value: Any) -> Any:
    """Return options as JSON reads them: functions are their names."""

    def named(part):
        if hasattr(part, "tolist"):
            return part.tolist()
        return getattr(part, "__qualname__", type(part).__name__)

    return json.loads(json.dumps(value, default=named))


def describe_image(image: Any) -> Any:
    """Return what stands for a picture in a record, ready for JSON.

    A path is absolute, and the contents of encoded files are a hash. A picture
    in memory is the name of its type, since its id stands for it.

    Args:
        image: a picture or a list of them, as `generate` takes it.
    """
    if isinstance(image, (list, tuple)):
        return [describe_image(each) for each in image]
    if isinstance(image, Mapping):
        return {str(key): describe_image(image[key]) for key in image}
    if isinstance(image, (bytes, bytearray)):
        return hashlib.sha256(image).hexdigest()
    if not isinstance(image, (str, os.PathLike)):
        return type(image).__name__
    path = picture_path(image)
    if path.startswith("data:"):
        return hashlib.sha256(path.encode("utf-8", "replace")).hexdigest()
    return path if is_uri(path) else os.path.abspath(path)


def _read(place):
    """Return the record at a place, or `None` if there is none."""
    if not place.exists():
        return None
    try:
        found = parse_json(place.read_bytes())
        return RunRecord(dict(found["settings"]), list(found["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place} is no record of a run. Expected: what an earlier call "
            "wrote, or no such file. Choose another output, or remove the "
            "file."
        ) from error


def _changes(there, here):
    """Return the names of two dicts that differ, with both values."""
    return {
        name: (there.get(name), here.get(name))
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    }


def _another_run(path, changed, of=""):
    shown = ", ".join(
        f"{name} {there!r:.200}, now {here!r:.200}"
        for name, (there, here) in changed.items()
    )
    return ValueError(
        f"{path} holds rows of another run. Received{of}: {shown}. Expected: "
        "the same as in the file. Choose another output, or remove the file."
    )
