"""Keras weight files: one `.weights.h5`, or an index and its shards."""

import contextlib
import json
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from keras_paligemma.checkpoints.storage.shards import shards

SINGLE = "model.weights.h5"
INDEX = "model.weights.json"
SHARD = "model_{:05}.weights.h5"
# Bytes of a shard, KerasHub's default.
SHARD_SIZE = 10 * 2**30

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = ("float64", "float32", "float16", "bfloat16")

# The errors of h5py on damaged files, and those raised while a file is scanned.
_DAMAGE = (OSError, RuntimeError, ValueError, TypeError, KeyError)


class H5Arrays:
    """The arrays of open files, by their path in the file; see `engine`.

    Keras makes the keys from attributes and lists, such as
    "layers/reversible_embedding/vars/0".

    Args:
        files: dict of path to open `h5py.File`.

    Raises:
        ValueError: a damaged file, or one whose arrays lie in other files.
    """

    def __init__(self, files):
        self._path_of, self._datasets = {}, {}
        self.shapes, self.dtypes = {}, {}
        for path, file in files.items():

            def add(key, item, path=path):
                if isinstance(item, h5py.Dataset):
                    self._add(path, key, item)

            # Soft and external links are not followed: their targets count
            # as missing.
            with _explained(path):
                file.visititems(add)

    def _add(self, path, key, dataset):
        if key in self._datasets:
            raise ValueError(f"{self._path_of[key]} holds {key} as well")
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{key} lies in another file")
        if dataset.shape is None or (
            dataset.size and not dataset.id.get_storage_size()
        ):
            # HDF5 would return zeros.
            raise ValueError(f"{key} holds no values")
        dtype = dataset.dtype.name
        if dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2:
            dtype = str(dataset.attrs.get("dtype"))
        if dtype not in DTYPES:
            raise ValueError(
                f"{key} holds {dtype}, expected some of {DTYPES}; quantized "
                "weights are not read"
            )
        self._path_of[key], self._datasets[key] = path, dataset
        self.shapes[key], self.dtypes[key] = dataset.shape, dtype

    def read(self, key):
        """Read one array into memory, in its saved dtype."""
        with _explained(self._path_of[key]):
            array = self._datasets[key][()]
        # HDF5 lacks bfloat16: Keras stores it as two opaque bytes.
        return array.view(BFLOAT16) if array.dtype.kind == "V" else array


@contextlib.contextmanager
def open_h5(paths):
    """Open the weight files of one model.

    Args:
        paths: list of `pathlib.Path`: `model.weights.h5`, or the index
            `model.weights.json` of shards in the same folder.

    Yields:
        `H5Arrays`.

    Raises:
        ValueError: a file that is missing, damaged or of another format, or
            an index that names a file outside its folder.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for path in paths:
            path = Path(path)
            for file in shards(path) if path.suffix == ".json" else [path]:
                with _explained(file):
                    files[file] = stack.enter_context(h5py.File(file, "r"))
        yield H5Arrays(files)


@contextlib.contextmanager
def _explained(path):
    """Convert every error of reading a file to one that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"{path} cannot be read as a weight file of Keras: {error!s:.300}. "
            "Is the file whole? Copy or save it again."
        ) from error


def write_h5(folder, arrays, shard_size=SHARD_SIZE):
    """Write the weight files of one model, one array in memory at a time.

    Args:
        folder: path of a folder without weights, such as a draft of
            `atomic.whole_folder`.
        arrays: iterable of pairs of key and NumPy array.
        shard_size: int, maximum bytes of arrays in a file; a larger array has
            a file of its own. A single file has no index.

    Returns:
        int, number of values written.

    Raises:
        ValueError: the folder already contains weights.
    """
    folder = Path(folder)
    existing = sorted(path.name for path in folder.glob("model*.weights.*"))
    if existing:
        raise ValueError(
            f"{folder} holds weights already: {', '.join(existing)}. Expected: "
            "a folder without. Choose another or remove them."
        )
    writer = _Writer(folder, shard_size)
    try:
        for key, array in arrays:
            writer.add(key, array)
            # Free the array before the next one is made.
            del array
    finally:
        writer.file.close()
    writer.finish()
    return writer.count


class _Writer:
    """Writes arrays to shards, and an index of their names."""

    def __init__(self, folder, shard_size):
        self.folder = folder
        self.shard_size = shard_size
        self.weight_map = {}
        self.num_shards = 0
        self.count = 0
        self.total = 0
        self._start()

    def _start(self):
        self.shard = SHARD.format(self.num_shards)
        self.file = h5py.File(self.folder / self.shard, "w")
        self.num_shards += 1
        self.filled = 0

    def add(self, key, array):
        if self.filled and self.filled + array.nbytes > self.shard_size:
            self.file.close()
            self._start()
        if array.dtype == BFLOAT16:
            dataset = self.file.create_dataset(key, data=array.view("V2"))
            dataset.attrs["dtype"] = "bfloat16"
        else:
            self.file.create_dataset(key, data=array)
        shards = self.weight_map.setdefault(f"/{key.rpartition('/')[0]}", [])
        if self.shard not in shards:
            shards.append(self.shard)
        self.filled += array.nbytes
        self.total += array.nbytes
        self.count += array.size

    def finish(self):
        if self.num_shards == 1:
            (self.folder / self.shard).rename(self.folder / SINGLE)
            return
        content = {
            "metadata": {"total_size": self.total},
            "weight_map": self.weight_map,
        }
        text = json.dumps(content, indent=4)
        (self.folder / INDEX).write_text(text, encoding="utf-8")
