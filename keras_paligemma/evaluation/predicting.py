"""Predictions of all samples, batch by batch, on all devices and hosts."""

import contextlib
import os
import sys

from keras_paligemma import compat
from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import located
from keras_paligemma.evaluation import predictions as files

PREDICTIONS = "predictions.jsonl"


def predict(
    model, benchmark, samples, output, batch_size, shard=(0, 1), progress=True
) -> None:
    """Predict all samples that have no prediction in `output` yet.

    Args:
        model, benchmark, samples, output, batch_size, shard, progress: as
            `evaluate` takes them, on this host.
    """
    index, parts = shard
    own = _rows_of(len(samples), batch_size, index, parts)
    ids = [samples.ids[row] for row in own]
    steps = -(-len(samples) // (batch_size * parts))
    path = output / PREDICTIONS
    if parts > 1:
        if path.is_file():
            return
        path = output / f"predictions-{index}-of-{parts}.jsonl"
    done = files.resume(path, ids, batch_size)
    # Hosts compute each batch together, so all start where the slowest stopped.
    begun = compat.least(steps if done == len(ids) else done // batch_size)
    files.resume(path, ids, batch_size, begun * batch_size)
    bar = _bar(benchmark, steps, progress)
    with _decoding(model, benchmark.beams), bar as advance:
        advance(begun)
        for step in range(begun, steps):
            rows = own[step * batch_size : (step + 1) * batch_size]
            # The last batch is padded, so that only one shape is compiled.
            fill = rows or [len(samples) - 1]
            padded = (rows + fill * batch_size)[:batch_size]
            texts = _answers(model, benchmark, samples, padded)
            pairs = zip((samples.ids[row] for row in rows), texts, strict=False)
            if _writes(parts):
                files.append(path, pairs)
            advance(1)
    if parts > 1:
        _merge(output, samples.ids, parts)


def _rows_of(count, batch_size, index, parts):
    """Return the rows of one part: its slice of each global batch."""
    step = batch_size * parts
    return [
        row
        for first in range(index * batch_size, count, step)
        for row in range(first, min(first + batch_size, count))
    ]


def _answers(model, benchmark, samples, rows):
    """Predict some samples; an error names the sample that caused it."""
    found = [samples[row] for row in rows]
    inputs = {
        "images": [sample.images for sample in found],
        "prompts": [sample.prompt for sample in found],
    }
    try:
        return model.generate(inputs, max_new_tokens=benchmark.text_length)
    except ValueError as error:
        for row, sample in zip(rows, found, strict=True):
            with located(samples.where(row)):
                model.preprocessor.generate_preprocess(
                    {"images": sample.images, "prompts": sample.prompt},
                    max_new_tokens=benchmark.text_length,
                )
        raise ExampleError(
            f"{samples.where(rows[0])} and those behind it: {error}"
        ) from error


@contextlib.contextmanager
def _decoding(model, beams):
    """Use beam search in this context, unless the benchmark has one beam."""
    if beams == 1:
        yield
        return
    import keras_hub

    before = model.sampler, model.generate_function
    model.sampler = keras_hub.samplers.BeamSampler(beams)
    model.generate_function = None
    try:
        yield
    finally:
        model.sampler, model.generate_function = before


def _writes(parts):
    """Return whether this process is the first of those with the same part."""
    index, count = compat.process()
    return index % max(count // parts, 1) == 0


def _merge(output, ids, parts):
    """Merge the files of all hosts, in the order of the samples."""
    compat.wait_for_all("predictions of all parts")
    if compat.process()[0] == 0:
        found = {}
        for index in range(parts):
            part = output / f"predictions-{index}-of-{parts}.jsonl"
            if part.is_file():
                found |= files.read_predictions(part)
        files.check_predictions(found, ids)
        draft = output / f".{PREDICTIONS}"
        draft.unlink(missing_ok=True)
        files.append(draft, ((id, found[id]) for id in ids))
        os.replace(draft, output / PREDICTIONS)
    compat.wait_for_all("predictions in one file")


@contextlib.contextmanager
def _bar(benchmark, steps, shown):
    """Show a progress bar if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn
    from rich.progress import MofNCompleteColumn
    from rich.progress import Progress
    from rich.progress import TextColumn
    from rich.progress import TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn()]
    columns += [MofNCompleteColumn(), TimeRemainingColumn()]
    visible = shown and sys.stderr.isatty() and not compat.process()[0]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task(benchmark.name, total=steps)
        yield lambda count: progress.advance(task, count)
