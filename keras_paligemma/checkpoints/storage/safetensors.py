"""Safetensors: a single file, or the shards of a checkpoint."""

import contextlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_paligemma.checkpoints.storage.shards import shards

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHOWN = 10  # Maximum number of files that an error lists.
# Bytes of tensors in a file, which are in memory while it is written.
SHARD_SIZE = 2_000_000_000


class Tensors:
    """The tensors of open files; see `engine`.

    Args:
        files: dict of path to open `safe_open` handle.
        quantized: bool, whether weights may be integers, as in our presets.

    Raises:
        ValueError: an unsupported dtype, or a key in two files.
    """

    def __init__(self, files, quantized=False):
        self._known = DTYPES | (QUANTIZED if quantized else {})
        self._path_of, self._slices = {}, {}
        self._file_of, self.shapes, self.dtypes = {}, {}, {}
        for path, file in files.items():
            for key in file.keys():
                self._add(path, file, key)

    def _add(self, path, file, key):
        if key in self._file_of:
            raise ValueError(
                f"{path} and {self._path_of[key]} both hold {key!r}. "
                "Expected: each tensor in one file. Remove the files of the "
                "other checkpoint."
            )
        with _damage(path):
            tensor = file.get_slice(key)
            dtype, shape = tensor.get_dtype(), tensor.get_shape()
        if dtype not in self._known:
            raise ValueError(
                f"{path} holds {key!r} as {dtype}. Expected: one of "
                f"{sorted(DTYPES)}. Of weights that bitsandbytes quantised "
                "(U8, I8), load the model that they were made from, or in "
                "transformers call `model.dequantize()` and save that; "
                "otherwise the file is damaged."
            )
        self._path_of[key], self._file_of[key] = path, file
        self._slices[key] = tensor
        self.shapes[key], self.dtypes[key] = tuple(shape), self._known[dtype]

    def read(self, key):
        with _damage(self._path_of[key]):
            return self._file_of[key].get_tensor(key)

    def read_rows(self, key, start, stop):
        """Read only the rows from `start` to `stop`, or to the end."""
        with _damage(self._path_of[key]):
            return self._slices[key][start : min(stop, self.shapes[key][0])]


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
QUANTIZED = {"I8": "int8"}


class Headers:
    """Shapes and dtypes of tensors without values; see `engine`.

    Args:
        found: dict of key to a pair of dtype, as the format names it, and
            shape.
    """

    def __init__(self, found):
        self.shapes = {key: shape for key, (_, shape) in found.items()}
        self.dtypes = {
            key: DTYPES.get(dtype, dtype) for key, (dtype, _) in found.items()
        }


@contextlib.contextmanager
def _damage(path):
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error!s:.300}. Is the "
            "file whole? Copy or save it again."
        ) from error


@contextlib.contextmanager
def open_safetensors(paths, quantized=False):
    """Open files of one checkpoint, memory-mapped.

    Args:
        paths: list of `pathlib.Path`, from `find`.
        quantized: bool, see `Tensors`.

    Yields:
        `Tensors`.

    Raises:
        ValueError: a file that is damaged or of another format. Damage of the
            values alone is not detected: the format has no checksum.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for path in paths:
            with _damage(path):
                file = safe_open(path, framework="numpy")
                files[path] = stack.enter_context(file)
        yield Tensors(files, quantized)


def find(folder):
    """Find the file or the shards of the checkpoint in a folder.

    Args:
        folder: str or path.

    Returns:
        list of `pathlib.Path`, sorted.

    Raises:
        ValueError: no checkpoint, an invalid index, or missing shards.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(
            f"{folder} holds no weights. Expected: {SINGLE} or {INDEX} and "
            "its shards. Pickles of Torch (pytorch_model.bin, .pth) can be "
            "saved anew by transformers' `save_pretrained`."
        )
    paths = shards(index)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = "" if len(missing) <= SHOWN else ", …"
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(paths)} files that "
            f"{INDEX} names: {', '.join(missing[:SHOWN])}{more}. Download or "
            "copy them."
        )
    return paths


def write_file(path, arrays, metadata=None):
    """Write a file that all users can read; safetensors' own only its owner.

    Args:
        path: `pathlib.Path`.
        arrays: dict of key to contiguous NumPy array.
        metadata: dict of str to str, or `None`.
    """
    save_file(arrays, path, metadata)
    path.chmod(0o644)


def write_safetensors(folder, arrays, max_shard_size: float = SHARD_SIZE):
    """Write the weights of a checkpoint, with one shard in memory.

    A single shard is named `model.safetensors`; several are numbered and have
    an index, which is written last.

    Args:
        folder: str or path of a folder without weights, such as a draft of
            `atomic.whole_folder`.
        arrays: iterable of pairs of key and NumPy array.
        max_shard_size: float, maximum bytes of tensors in a file; a larger
            tensor has a file of its own.

    Returns:
        list of the keys, in their order.

    Raises:
        ValueError: a duplicate key, or an unsupported dtype.
    """
    folder = Path(folder)
    known = sorted({**DTYPES, **QUANTIZED}.values())
    weight_map, total, shard, size, count = {}, 0, {}, 0, 0

    def flush():
        nonlocal size, count
        # transformers refuses a file without the framework of its tensors.
        write_file(folder / _shard_name(count, 0), shard, {"format": "pt"})
        shard.clear()
        size, count = 0, count + 1

    for key, array in arrays:
        if key in weight_map:
            raise ValueError(f"{key!r} comes twice. Expected: each key once.")
        if array.dtype.name not in known:
            raise ValueError(
                f"{key!r} is an array of {array.dtype.name}. Expected: one of "
                f"{known}. Cast it first."
            )
        if shard and size + array.nbytes > max_shard_size:
            flush()
        # Not `ascontiguousarray`, which adds an axis to a scalar.
        shard[key] = np.asarray(array, order="C")
        size, total = size + array.nbytes, total + array.nbytes
        weight_map[key] = count
        del array
        if size >= max_shard_size:
            # Free the shard before the next one is made.
            flush()
    if shard or not count:
        flush()
    # Names contain the number of shards, which is known only now.
    for number in range(count):
        draft = folder / _shard_name(number, 0)
        draft.rename(folder / _shard_name(number, count))
    if count > 1:
        names = {
            key: _shard_name(number, count)
            for key, number in weight_map.items()
        }
        index = {"metadata": {"total_size": total}, "weight_map": names}
        text = json.dumps(index, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    return list(weight_map)


def _shard_name(number, of):
    """Return the name of a shard; `of` is 0 until the count is known."""
    if of == 1:
        return SINGLE
    return f"model-{number + 1:05d}-of-{of:05d}.safetensors"
