"""Predictions of all samples, batch by batch, on all devices and hosts."""

import contextlib
import dataclasses
import sys

import numpy as np

from keras_paligemma import compat
from keras_paligemma.atomic import whole_file
from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import located
from keras_paligemma.evaluation import predictions as files
from keras_paligemma.preprocessing.inputs import is_list

# Options of `generate` that may have one value per prompt.
OF_ROWS = ("temperature", "top_k", "top_p", "min_p", "seed")


def predict(
    model,
    title,
    options,
    samples,
    path,
    record,
    *,
    batch_size,
    shard,
    progress,
    unread=None,
) -> list[int]:
    """Predict all samples that have no prediction in a file yet.

    Args:
        title: str, shown beside the progress bar.
        options: dict, keyword arguments of `generate`; an option of rows, see
            `OF_ROWS`, may have one value per sample.
        path: `pathlib.Path` of the file.
        record: `RunRecord` of all samples, kept beside the file: only the same
            run resumes.
        model, samples, batch_size, shard, progress: as `evaluate`
            takes them, on this host.
        unread: `Unread`, to which samples are added whose picture or prompt
            cannot be read; their prediction is "". `None` raises the error.

    Returns:
        list of int, the samples of this host that could not be read now.

    Raises:
        ValueError: the file holds rows of another run, or something else.
        ExampleError: a sample cannot be read, without `unread`.
    """
    index, parts = shard
    own = _rows_of(len(samples), batch_size, index, parts)
    ids = [samples.ids[row] for row in own]
    steps = -(-len(samples) // (batch_size * parts))
    together, of_all = path, record
    if parts > 1:
        if path.is_file() and files.is_whole(path, samples.ids, record):
            return []
        path, record = _part(path, index, parts), record.part(own)
    writes = _writes(parts)
    alone = files.only_writer(path) if writes else contextlib.nullcontext()
    failed = []
    with alone, _bar(title, steps, progress) as advance:
        done = files.resume(path, ids, batch_size, record=record)
        # Hosts compute each batch together, so all start where the slowest
        # stopped.
        begun = compat.least(steps if done == len(ids) else done // batch_size)
        files.resume(path, ids, batch_size, begun * batch_size)
        if unread is not None:
            if compat.process()[0] == 0:
                unread.resume(begun * batch_size * parts)
            compat.wait_for_all("list of what could not be read")
        if writes:
            record.write(path)
        advance(begun)
        for step in range(begun, steps):
            rows = own[step * batch_size : (step + 1) * batch_size]
            # The last batch is padded, so that only one shape is compiled.
            fill = rows or [len(samples) - 1]
            padded = (rows + fill * batch_size)[:batch_size]
            texts, errors = _answers(
                model, options, samples, padded, unread is not None
            )
            pairs = zip((samples.ids[row] for row in rows), texts, strict=False)
            wrong = [row for row in rows if row in errors]
            failed += wrong
            if writes and unread is not None:
                for row in wrong:
                    unread.add(row, errors[row])
            if writes:
                files.append(path, pairs)
            advance(1)
    if parts > 1:
        _merge(together, samples.ids, parts, of_all)
    return failed


def _rows_of(count, batch_size, index, parts):
    """Return the rows of one part: its slice of each global batch."""
    step = batch_size * parts
    return [
        row
        for first in range(index * batch_size, count, step)
        for row in range(first, min(first + batch_size, count))
    ]


def _answers(model, options, samples, rows, skips):
    """Predict some samples; an error names the sample that caused it.

    Returns:
        list of str, and dict of the rows that cannot be read to their errors,
        which are raised unless `skips`.
    """
    try:
        found = [samples[row] for row in rows]
        texts = model.generate(_inputs(found), **_options_of(options, rows))
        return texts, {}
    except ValueError as error:
        length = options["max_new_tokens"]
        found = {row: _readable(model, samples, row, length) for row in rows}
        errors = {
            row: read
            for row, read in found.items()
            if isinstance(read, ExampleError)
        }
        if not errors:
            raise ExampleError(
                f"{samples.where(rows[0])} and those behind it: {error}"
            ) from error
        if not skips:
            raise next(iter(errors.values())) from error
    good = [row for row in rows if row not in errors]
    if not good:
        if compat.process()[1] == 1:
            return [""] * len(rows), errors
        # Other hosts wait until this one runs the program of this batch too.
        good, found = rows[:1], {rows[0]: _blank(model, samples[rows[0]])}
    # Padded to the same size, for which the program is compiled already.
    padded = (good + good[:1] * len(rows))[: len(rows)]
    inputs = _inputs([found[row] for row in padded])
    texts = model.generate(inputs, **_options_of(options, padded))
    by_row = dict(zip(padded, texts, strict=True))
    return ["" if row in errors else by_row[row] for row in rows], errors


def _options_of(options, rows):
    """Return the options of some rows, from those of all."""
    return {
        name: [value[row] for row in rows]
        if name in OF_ROWS and np.ndim(value)
        else value
        for name, value in options.items()
    }


def _readable(model, samples, row, length):
    """Return a sample if `generate` can read it, else its error."""
    try:
        with located(samples.where(row)):
            sample = samples[row]
            model.preprocessor.generate_preprocess(
                _inputs([sample]), max_new_tokens=length
            )
    except ExampleError as error:
        return error
    return sample


def _blank(model, sample):
    """Return a sample of as many pictures, all black, without a prompt."""
    picture = np.zeros((model.backbone.image_size,) * 2 + (3,), "uint8")
    several = is_list(sample.images)
    images = [picture] * len(sample.images) if several else picture
    return dataclasses.replace(sample, images=images, prompt="")


def _inputs(found):
    return {
        "images": [sample.images for sample in found],
        "prompts": [sample.prompt for sample in found],
    }


def _writes(parts):
    """Return whether this process is the first of those with the same part."""
    index, count = compat.process()
    return index % max(count // parts, 1) == 0


def _part(path, index, parts):
    return path.with_name(f"{path.stem}-{index}-of-{parts}{path.suffix}")


def _merge(path, ids, parts, record):
    """Merge the files of all hosts, in the order of the samples."""
    compat.wait_for_all("predictions of all parts")
    if compat.process()[0] == 0:
        found = {}
        for index in range(parts):
            part = _part(path, index, parts)
            if part.is_file():
                found |= files.read_predictions(part)
        files.check_predictions(found, ids)
        with whole_file(path) as draft:
            files.append(draft, ((id, found[id]) for id in ids))
            record.write(path)
    compat.wait_for_all("predictions in one file")


@contextlib.contextmanager
def _bar(title, steps, shown):
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
        task = progress.add_task(title, total=steps)
        yield lambda count: progress.advance(task, count)
