"""A file in byte pieces, which is found, read and written as one file.

Hubs limit the size of a file, so large checkpoints are published as
`X.npz.part-00000-of-00003` and so on, to be joined with `cat`. They are read
in place: joining 20 GB would need a second copy on disk or in memory.
"""

import bisect
import io
import itertools
import os
import re
import sys
from pathlib import Path

PIECE = re.compile(r"(.+\.npz)\.part(?:-(\d+)-of-(\d+)|.*)")
NUMBERED = "{}.part-{:05d}-of-{:05d}"


def find_pieces(path):
    """Find the file or the pieces of an .npz.

    Users pass the name of the whole file or of any piece. Names that contain
    the number of pieces are checked against it, so that a missing piece is
    reported before any read.

    Args:
        path: str or path: `X.npz`, which may exist only in pieces, or one of
            the pieces, `X.npz.part-00000-of-00003` or any other
            `X.npz.part*`.

    Returns:
        list of `pathlib.Path`, in the order of their bytes.

    Raises:
        ValueError: no such file, or a piece that is missing, duplicate or of
            another set.
    """
    path = Path(path)
    match = PIECE.fullmatch(path.name)
    if match is None and path.is_file():
        return [path]
    stem = match[1] if match else path.name
    beside = path.parent.iterdir() if path.parent.is_dir() else []
    start = f"{stem}.part"
    found = [file for file in beside if file.name.startswith(start)]
    ordered = in_order(found) if found else []
    if not ordered or (match and path not in ordered):
        raise ValueError(
            f"{path} does not exist. Expected that file, or {stem}.part* in "
            f"{path.parent}; found {[piece.name for piece in ordered]}."
        )
    return ordered


def in_order(paths):
    """Sort pieces by their position; raise if the set is not complete."""
    paths = sorted(paths, key=lambda path: path.name)
    names = [path.name for path in paths]
    matches = [match for name in names if (match := PIECE.fullmatch(name))]
    if len(paths) == 1 and not matches:
        return paths
    if (
        len(matches) < len(names)
        or len({(match[1], match[3]) for match in matches}) != 1
    ):
        raise ValueError(
            f"{names} are not the pieces of one file. Expected one .npz, or "
            "X.npz.part* all named alike; move the others away."
        )
    if matches[0][3] is None:
        return paths
    total = int(matches[0][3])
    at = {}
    for path, match in zip(paths, matches, strict=True):
        at.setdefault(int(match[2]), []).append(path)
    # No set of the whole range: a name may claim any number of pieces.
    absent = (number for number in range(total) if number not in at)
    absent = list(itertools.islice(absent, 10))
    twice = [str(path) for many in at.values() for path in many[1:]]
    beyond = [str(at[number][0]) for number in at if number >= total]
    if absent or twice or beyond:
        stem = paths[0].with_name(matches[0][1])
        absent = [NUMBERED.format(stem, number, total) for number in absent]
        raise ValueError(
            f"{stem} is not whole: expected {total} pieces, received "
            f"{len(paths)}; missing (at most ten are shown): {absent}, there "
            f"twice: {twice}, beyond the last: {beyond}. Copy the missing "
            "ones, move the others away."
        )
    return [at[number][0] for number in range(total)]


class Reader(io.RawIOBase):
    """Files, read as if they were joined.

    Args:
        files: list of `io.FileIO`, to be closed by the caller.
    """

    def __init__(self, files):
        self._files = files
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        self._ends = list(itertools.accumulate(sizes))
        self.size = self._ends[-1]
        self._position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise OSError(f"byte {position} is before the start")
        self._position = position
        return position

    def readinto(self, buffer):
        # To zipfile a short read means the end: continue in the next file.
        done = 0
        while done < len(buffer) and self._position < self.size:
            index = bisect.bisect_right(self._ends, self._position)
            left = self._ends[index] - self._position
            file = self._files[index]
            file.seek(-left, io.SEEK_END)
            got = file.readinto(memoryview(buffer)[done : done + left])
            if not got:
                raise OSError(f"{file.name} became shorter while it was read")
            done += got
            self._position += got
        return done

    def holding(self, member):
        """Return the names of the files that contain a member of the zip."""
        start = member.header_offset
        # A hundred bytes for the zip header of the member.
        stop = start + 100 + len(member.orig_filename) + member.compress_size
        starts = [0, *self._ends]
        bounds = zip(self._files, starts, self._ends, strict=False)
        names = [
            file.name
            for file, begin, end in bounds
            if begin < stop and start < end
        ]
        return names or [file.name for file in self._files]


class Writer(io.RawIOBase):
    """A writable, seekable file that is stored as files of equal size.

    Args:
        path: `pathlib.Path`, the target.
        piece_size: int, bytes of a piece, or `None` for a single file.
        folder: `pathlib.Path`, where the files are until they are complete;
            on the target's file system.
    """

    def __init__(self, path, piece_size, folder):
        self._path, self._whole = path, piece_size is None
        self._folder = folder
        self._size = piece_size or sys.maxsize
        self._files = []
        self._position = 0

    def writable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        # zipfile calls `tell` and seeks back to positions it has written.
        self._position = offset + (0, self._position)[whence]
        return self._position

    def write(self, data):
        data = memoryview(data)
        done = 0
        while done < len(data):
            index, start = divmod(self._position, self._size)
            if index == len(self._files):
                draft = self._folder / f"{index:05d}"
                self._files.append(io.FileIO(draft, "w"))
            file = self._files[index]
            file.seek(start)
            wrote = file.write(data[done : done + self._size - start])
            done += wrote
            self._position += wrote
        return done

    def publish(self):
        """Rename the files."""
        for file in self._files:
            os.fsync(file.fileno())
            file.close()
        old = [
            file
            for file in self._path.parent.iterdir()
            if (match := PIECE.fullmatch(file.name))
            and match[1] == self._path.name
            and match[3]
        ]
        if self._whole:
            os.replace(self._files[0].name, self._path)
        # Before the new pieces appear: old and new pieces must never mix.
        for piece in old:
            piece.unlink()
        if not self._whole:
            total = len(self._files)
            for index, file in enumerate(self._files):
                name = NUMBERED.format(self._path, index, total)
                os.replace(file.name, name)
            # Last: until all pieces exist, readers use the whole file.
            self._path.unlink(missing_ok=True)

    def close(self):
        """Close the files."""
        for file in self._files:
            file.close()
        super().close()
