"""Safetensors: one file, or several that together hold a checkpoint."""

import contextlib

from safetensors import SafetensorError
from safetensors import safe_open


class Tensors:
    """The tensors of open files; see `engine`.

    Args:
        files: list of open `safe_open` handles.
    """

    def __init__(self, files):
        self._file_of = {key: file for file in files for key in file.keys()}
        slices = {
            key: file.get_slice(key) for key, file in self._file_of.items()
        }
        self.shapes = {
            key: tuple(one.get_shape()) for key, one in slices.items()
        }
        self.dtypes = {
            key: DTYPES[one.get_dtype()] for key, one in slices.items()
        }

    def read(self, key):
        return self._file_of[key].get_tensor(key)


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


@contextlib.contextmanager
def open_safetensors(paths):
    """Open files of one checkpoint, memory-mapped.

    Args:
        paths: list of `pathlib.Path`.

    Yields:
        `Tensors`.

    Raises:
        ValueError: a file that is damaged or holds something else.
    """
    with contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            try:
                files.append(
                    stack.enter_context(safe_open(path, framework="numpy"))
                )
            except SafetensorError as error:
                raise ValueError(
                    f"{path} cannot be read as safetensors: {error}. Is the "
                    "file whole? Copy or save it again."
                ) from error
        yield Tensors(files)
