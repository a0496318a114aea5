"""Checkpoint files: written atomically, verified, and set aside if damaged."""

import itertools
import json
import shutil
import textwrap
import warnings
import zlib

import keras
import numpy as np

from keras_paligemma import atomic
from keras_paligemma.compat import process


class CheckpointFiles:
    """A description and named nests of arrays for each step, stored by Orbax.

    Orbax writes checkpoints atomically but does not detect later damage to
    compressed arrays, so checksums of all arrays are written too. Runs of
    several processes have none, since shards would have to be gathered.

    Args:
        directory: str or path.
        keep: int, number of the latest checkpoints to keep.

    Raises:
        ImportError: Orbax is not installed.
        ValueError: the directory is an address, or its checkpoints cannot be
            listed.

    Source: https://orbax.readthedocs.io.
    """

    def __init__(self, directory, keep):
        self._orbax = _orbax()
        self.directory = atomic.local(directory).absolute()
        self._keep = keep
        self._manager = self._open()

    def latest(self):
        """Return the latest step, or `None`; its checkpoint may be damaged."""
        return self._manager.latest_step()

    def write(self, step, description, arrays):
        """Write a checkpoint.

        Args:
            step: int.
            description: dict of JSON values.
            arrays: dict of names to nests of arrays, of JAX (sharded or not)
                or NumPy.

        Raises:
            OSError: the disk is full or failed.
        """
        arguments = self._orbax.args
        content = {"description": description, "checksums": None}
        if process()[1] == 1:
            content["checksums"] = {
                name: _checksums(nest) for name, nest in arrays.items()
            }
        items = {
            name: arguments.StandardSave(nest) for name, nest in arrays.items()
        }
        sealed = {"content": content, "checksum": _json_checksum(content)}
        items["place"] = arguments.JsonSave(sealed)
        try:
            self._manager.save(step, args=arguments.Composite(**items))
        except (OSError, ValueError) as error:
            free = shutil.disk_usage(self.directory).free
            # Orbax's tracebacks have 40 kB and no further information.
            raise OSError(
                f"The checkpoint of step {step} could not be written to "
                f"{self.directory}, where {free:,} bytes are free. Received: "
                f"{_shortened(error)} Make room and run the same again: it "
                f"goes on after step {self.latest() or 0}."
            ) from None

    def read_newest(self, wanted):
        """Read the newest intact checkpoint.

        Newer checkpoints that are damaged are renamed to `damaged-STEP.0`,
        with a warning, so that their steps can be written again.

        Args:
            wanted: function of step and description that returns a dict of
                names to nests of arrays, with the shapes, dtypes and shardings
                to read. Its errors are not treated as damage.

        Returns:
            Tuple of step, description, and dict of names to nests of arrays.

        Raises:
            ValueError: no checkpoint is intact.
        """
        problems = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            content = self._attempt(problems, step, self._read_content)
            if content is None:
                continue
            like = wanted(step, content["description"])
            arrays = self._attempt(
                problems, step, self._read_arrays, like, content["checksums"]
            )
            if arrays is None:
                continue
            if problems:
                self._put_aside(problems, step)
            return step, content["description"], arrays
        raise ValueError(
            f"No checkpoint in {self.directory} can be read. Received: "
            f"{_listed(problems)} Expected: a whole one. Restore the files "
            "from a copy, or begin anew in another directory."
        )

    def _attempt(self, problems, step, read, *args):
        """Read a step, or record its problem and return `None`."""
        try:
            return read(step, *args)
        # Damage can raise any error, from Orbax or the libraries below it.
        except Exception as error:
            if process()[1] > 1:
                # Other processes may have read it and would resume from it.
                raise ValueError(
                    f"The checkpoint of step {step} in {self.directory} is "
                    f"damaged. Received: {_shortened(error)} Expected: a "
                    "whole one. Move its folder away and run the same again."
                ) from error
            problems[step] = error
            return None

    def _read_content(self, step):
        arguments = self._orbax.args
        sealed = self._manager.restore(
            step, args=arguments.Composite(place=arguments.JsonRestore())
        ).place
        if _json_checksum(sealed["content"]) != sealed["checksum"]:
            raise ValueError("The description is not what was written.")
        return sealed["content"]

    def _read_arrays(self, step, like, checksums):
        arguments = self._orbax.args
        items = {
            name: arguments.StandardRestore(nest) for name, nest in like.items()
        }
        found = self._manager.restore(step, args=arguments.Composite(**items))
        arrays = {name: found[name] for name in like}
        for name, nest in arrays.items():
            if checksums and _checksums(nest) != checksums[name]:
                raise ValueError(f"Values of {name!r} are not those written.")
        return arrays

    def _put_aside(self, problems, whole):
        for step in problems:
            numbers = itertools.count()
            places = (self.directory / f"damaged-{step}.{n}" for n in numbers)
            free = next(place for place in places if not place.exists())
            (self.directory / str(step)).rename(free)
        # A new manager, without cached metadata of the damaged folder.
        self._manager.close()
        self._manager = self._open()
        warnings.warn(
            f"Damaged checkpoints in {self.directory} were renamed: "
            f"{_listed(problems)} The run goes on after step {whole}.",
            stacklevel=2,
        )

    def _open(self):
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False
        )
        try:
            return self._orbax.CheckpointManager(
                self.directory, options=options
            )
        except ValueError as error:
            raise ValueError(
                f"The checkpoints in {self.directory} cannot be listed. "
                f"Received: {_shortened(error)} Expected: folders that Orbax "
                "wrote. Move the newest away and run the same again."
            ) from error


def _checksums(nest):
    """Return a checksum of each array."""
    return [
        zlib.crc32(np.ascontiguousarray(array).reshape(-1).view("uint8").data)
        for array in keras.tree.flatten(nest)
    ]


def _json_checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _shortened(error):
    text = textwrap.shorten(str(error), 400) or type(error).__name__
    return text.removesuffix(".") + "."


def _listed(problems):
    parts = [
        f"step {step} ({type(error).__name__}: {_shortened(error)[:-1]})"
        for step, error in problems.items()
    ]
    return "; ".join(parts) + "."


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints of a run are written by Orbax. Install it: pip "
            "install 'keras_paligemma[train]'."
        ) from error
    return orbax.checkpoint
