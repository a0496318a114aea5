"""NumPy's .npz, the original's format: a single file, or byte pieces of one.

The files are not trusted: the sizes in their headers are checked against the
size of the file before anything is allocated, and nothing is unpickled.
"""

import contextlib
import io
import math
import re
import struct
import tokenize
import zipfile
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from keras_paligemma import atomic
from keras_paligemma.checkpoints.storage.pieces import Reader
from keras_paligemma.checkpoints.storage.pieces import Writer
from keras_paligemma.checkpoints.storage.pieces import find_pieces
from keras_paligemma.checkpoints.storage.pieces import in_order

__all__ = ["Tensors", "find_pieces", "open_npz", "write_npz"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = ("float16", "float32", "float64")
NAMES += ("int8", "int16", "int32", "int64")
NAMES += ("uint8", "uint16", "uint32", "uint64")
# NumPy has no name for bfloat16 and stores it as two opaque bytes.
DTYPES = {np.dtype(name).str: np.dtype(name) for name in NAMES}
DTYPES["|V2"] = BFLOAT16

VERSIONS = ((1, 0), (2, 0), (3, 0))
# Maximum bytes of a header: it is parsed as Python literals.
HEADER_LIMIT = 10_000
# Maximum bytes that a deflated byte expands to: 258 bytes in two bits.
DEFLATE_LIMIT = 1032
# Bytes per read: small compared with an array, large enough for few calls.
CHUNK = 1 << 20

# The errors of zipfile, zlib and NumPy on damaged bytes, observed or
# documented; RuntimeError includes NotImplementedError.
LIBRARY_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    ValueError,
    tokenize.TokenError,
)


@contextlib.contextmanager
def open_npz(paths):
    """Open an .npz file, or its pieces as if they were joined.

    Opening reads the directory and the header of each array, but no values.
    Reading an array checks its checksum.

    Args:
        paths: list of `pathlib.Path`, from `find_pieces`.

    Yields:
        `Tensors`.

    Raises:
        ValueError: a missing piece, or a file that is damaged or contains
            anything but arrays of numbers. Reading raises it, too.
    """
    paths = in_order(paths)
    with contextlib.ExitStack() as stack:
        with _refusing(_names(paths)):
            files = [stack.enter_context(io.FileIO(path)) for path in paths]
            pieces = Reader(files)
            archive = stack.enter_context(zipfile.ZipFile(pieces))
            _check_members(pieces, archive.infolist())
        yield Tensors(pieces, archive)


def _names(paths):
    """Return the name of a file, or of the first and last of several."""
    ends = dict.fromkeys([str(paths[0]), str(paths[-1])])
    return " to ".join(ends)


@contextlib.contextmanager
def _refusing(what):
    """Convert every error of reading to one that names the file and the fix."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        # zipfile quotes the name, of any length.
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(
            f"{what} cannot be read: {reason}. Is it whole? Copy it again "
            "from where it came, or save it again as plain arrays."
        ) from error


def _check_members(pieces, members):
    """Compare the number of members with the count at the end of a zip.

    zipfile ignores the count, so a wrong length in the directory could hide a
    member. It only warns of two members at the same place, since Python 3.13.
    """
    found = len(members)
    if len({member.header_offset for member in members}) < found:
        raise ValueError("two members of the zip begin at the same byte")
    pieces.seek(-22, io.SEEK_END)
    end = pieces.read(22)
    count = int.from_bytes(end[10:12], "little")
    # All ones: the count is too large for the field.
    if end[:4] != b"PK\5\6" or count not in (found, 0xFFFF):
        raise ValueError(
            f"expected a zip directory of {count} members at its end, "
            f"received {found} members"
        )


class Tensors:
    """The arrays of an open .npz; see `engine`.

    Args:
        pieces: `pieces.Reader`.
        archive: `zipfile.ZipFile` over them.
    """

    def __init__(self, pieces, archive):
        self._pieces, self._archive = pieces, archive
        self._members, self._begun = {}, {}
        self.shapes, self.dtypes = {}, {}
        for member in archive.infolist():
            with self._refusing(member):
                key = _key(member.orig_filename)
                if key in self._members:
                    raise ValueError("two members have this name")
                stream, header = self._open(member)
            self._members[key], self._begun[key] = member, (stream, header)
            self.shapes[key] = header.shape
            self.dtypes[key] = str(header.dtype)

    def read(self, key):
        member = self._members[key]
        with self._refusing(member):
            # Continue after the header, so that no byte is read twice.
            stream, header = self._begun.pop(key, None) or self._open(member)
            return _read_values(stream, header)

    def _open(self, member):
        """Open a member, check its sizes, and read its header."""
        inside, outside = member.file_size, member.compress_size
        most = {
            zipfile.ZIP_STORED: outside,
            zipfile.ZIP_DEFLATED: outside * DEFLATE_LIMIT,
        }.get(member.compress_type)
        if most is None:
            raise ValueError(
                f"compression {member.compress_type}, expected stored or "
                "deflated"
            )
        if inside > most or outside > self._pieces.size:
            raise ValueError(
                f"it claims {inside} bytes in {outside} bytes of a file of "
                f"{self._pieces.size}"
            )
        stream = self._archive.open(member)
        # Otherwise zipfile reads 4 kB ahead, beyond the header.
        stream.MIN_READ_SIZE = 1
        header = _read_header(stream)
        shape, dtype = header.shape, header.dtype
        expected = header.length + math.prod(shape) * dtype.itemsize
        if inside != expected:
            raise ValueError(
                f"{dtype}{list(shape)} takes {expected} bytes with its "
                f"header, received {inside}"
            )
        return stream, header

    def _refusing(self, member):
        files = self._pieces.holding(member)
        return _refusing(f"{_names(files)}: member {member.orig_filename!r}")


def _key(name):
    """Convert a member's name to its key."""
    key = name.removesuffix(".npy")
    if key in ("", name):
        raise ValueError("expected a name that ends in .npy")
    # Keys may become paths; no checkpoint has such names.
    if re.search(r"\0|^[/\\]|(^|[/\\])\.\.([/\\]|$)", key):
        raise ValueError("its name leads out of the file")
    return key


class _Header(NamedTuple):
    """The header of a .npy; `fortran` if its first axis is contiguous."""

    length: int
    shape: tuple
    dtype: np.dtype
    fortran: bool


def _read_header(stream):
    version = npy.read_magic(stream)
    if version not in VERSIONS:
        raise ValueError(f"version {version} of NumPy's format is unknown")
    # Version 3 differs from 2 only in names of fields, which numbers lack.
    first = version == (1, 0)
    read = npy.read_array_header_1_0 if first else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream, max_header_size=HEADER_LIMIT)
    if dtype.str not in DTYPES:
        found = "structured" if dtype.names else dtype.str
        raise ValueError(
            f"its dtype is {found!r}, expected one of {', '.join(NAMES)} "
            "and bfloat16"
        )
    if any(size < 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return _Header(stream.tell(), shape, DTYPES[dtype.str], fortran)


def _read_values(stream, header):
    """Read the values of one array, which follow its header.

    zipfile checks the checksum with the last byte, and the size matches the
    shape: an array that is read completely has been checked.
    """
    shape = header.shape[::-1] if header.fortran else header.shape
    array = np.empty(shape, header.dtype)
    values = array.reshape(-1).view(np.uint8)
    done = 0
    while got := stream.readinto(values[done : done + CHUNK]):
        done += got
    if done < values.size:
        raise ValueError(f"expected {values.size} bytes, received {done}")
    return array.T if header.fortran else array


def write_npz(path, arrays, piece_size=None):
    """Write an .npz in the original's layout, one array in memory at a time.

    Drafts are written to a hidden folder beside the target and renamed when
    they are complete and on disk. If the process is killed, the target is the
    old or the new file, and the next writer deletes the drafts.
    Between the renames of several pieces it is an incomplete set of pieces,
    which `find_pieces` and `open_npz` refuse. Equal arrays give equal bytes.

    Args:
        path: str or path, `X.npz`; a file of that name, or its numbered
            pieces, are replaced.
        arrays: iterable of pairs of key and `np.ndarray`.
        piece_size: int, bytes of a piece, for files
            `X.npz.part-00000-of-00003` and so on; `None` for a single file.

    Raises:
        ValueError: an array that is not of numbers, or a key that is a
            duplicate or not a valid name; drafts are then removed.
    """
    path = atomic.local(path)
    if path.suffix != ".npz" or (piece_size is not None and piece_size < 1):
        raise ValueError(
            f"Expected a path that ends in .npz and a piece_size of at least "
            f"one byte, received {path} and {piece_size}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}{atomic.DRAFT}"
    with (
        atomic.draft_folder(path.parent, prefix) as folder,
        Writer(path, piece_size, folder) as drafts,
    ):
        with zipfile.ZipFile(drafts, "w") as archive:
            for key, array in arrays:
                _write_member(archive, key, array)
                # Free the array before the next one is made.
                del array
        drafts.publish()


def _write_member(archive, key, array):
    name = f"{key}.npy"
    try:
        _key(name)
    except ValueError as error:
        raise ValueError(f"{key!r} cannot be a key: {error}.") from None
    if name in archive.namelist():
        raise ValueError(f"{key!r} came twice; expected each key once.")
    if array.dtype not in DTYPES.values():
        raise ValueError(
            f"{key!r} is {array.dtype}, expected one of {', '.join(NAMES)} "
            "and bfloat16; convert it."
        )
    if array.dtype == BFLOAT16:
        array = array.view("V2")
    # No time stamp; like NumPy, with room for more than 4 GB.
    member = zipfile.ZipInfo(name)
    with archive.open(member, "w", force_zip64=True) as stream:
        npy.write_array(stream, array, allow_pickle=False)
