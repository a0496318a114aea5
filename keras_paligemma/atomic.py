"""Atomic writes: all or nothing, even if the writer is killed."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

DRAFT = ".draft-"
# What `tempfile` adds to a prefix.
RANDOM = re.compile("[a-z0-9_]{8}")
# `Path` makes one slash of the two of an address.
ADDRESS = re.compile("[a-z][a-z0-9+.-]+:/")


def local(path):
    """Return a path of this machine, with `~` expanded.

    Raises:
        ValueError: it is an address, such as "gs://bucket/model", is empty, or
            starts with "~" and a user who has no home here.
    """
    if not os.fspath(path):
        raise ValueError(
            "Files are written to a path of this machine. Received: ''. "
            "Expected: a path; '.' is the current folder."
        )
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"'~' and a name is the home of a user. Received: '{path}', a user "
            "without one here. Expected: a path that starts with '/'."
        ) from error
    if ADDRESS.match(str(path)):
        raise ValueError(
            "Files are written to a path of this machine. Received: an "
            f"address, '{str(path).replace(':/', '://', 1)}'. Write to a local "
            "folder and copy it there, or mount the bucket."
        )
    return path


@contextlib.contextmanager
def whole_folder(folder, entry, replaced=()):
    """Write files so that they appear in a folder all at once.

    A new folder is written next to its final path and renamed. In an existing
    folder the files are written to a draft folder, which is renamed to
    `.ENTRY.new` when complete; then each file is linked to its final path, the
    entry last, and `.ENTRY.new` is removed. The folder itself is never moved
    and files of other names are not touched, so that it may be a mount or the
    current directory, or hold a user's notes.

    If the writer is killed at any time, `current` finds either all old or all
    new files. A reader that does not call `current` finds the same files or,
    during the last steps, no entry. A killed writer may leave a hidden folder
    `.draft-*`, which is never read; the next writer deletes it. If it leaves
    `.ENTRY.new`, the next writer completes the installation. There is no lock
    against a second writer.

    Args:
        folder: path.
        entry: str, name of the file that readers need to recognise the folder.
        replaced: glob patterns of files of an earlier write, deleted when the
            new files are complete.

    Yields:
        `pathlib.Path` of the draft, an empty folder to write into. It is
        deleted if the block raises.

    Example:

    ```python
    with whole_folder("model", "config.json", ["*.safetensors"]) as draft:
        (draft / "config.json").write_text("{}")
    ```
    """
    folder = local(folder).resolve()
    there = folder.exists()
    if there and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Expected: a folder.")
    if there:
        _install(folder, entry, replaced)
        home, prefix = folder, DRAFT
    else:
        home, prefix = folder.parent, f".{folder.name}{DRAFT}"
        home.mkdir(parents=True, exist_ok=True)
    with draft_folder(home, prefix) as draft:
        draft.chmod(0o755)
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        os.rename(draft, _complete(folder, entry) if there else folder)
    sync(home)
    _install(folder, entry, replaced)


@contextlib.contextmanager
def draft_folder(home, prefix):
    """Make a folder that is deleted at the end, unless it was renamed.

    Folders of this prefix that killed processes left are deleted first. They
    are recognised by a lock, which a process holds for as long as it lives.
    Where the file system has no locks, nothing is deleted.

    Args:
        home: path, where the folder is made.
        prefix: str, beginning of its name.

    Yields:
        `pathlib.Path`.
    """
    for path in home.iterdir():
        if path.name.startswith(prefix) and RANDOM.fullmatch(
            path.name[len(prefix) :]
        ):
            with contextlib.suppress(OSError), locked(path):
                shutil.rmtree(path)
    draft = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(draft))
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def locked(path):
    """Lock a file or folder until the end of the block, or of the process.

    Args:
        path: path.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: there are no locks, as on Windows and some network file
            systems.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("Windows has no such locks.") from error
    # Some network file systems lock only files that are open to be written.
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path):
    """Write a file so that it appears all at once, or not at all.

    Args:
        path: `pathlib.Path` of the file, whose folder exists.

    Yields:
        `pathlib.Path` of the draft beside it, which does not exist yet. It is
        deleted if the block raises; that of a killed writer is replaced.

    Example:

    ```python
    with whole_file(Path("settings.json")) as draft:
        draft.write_text("{}")
    ```
    """
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def current(folder, entry):
    """Return the folder to read, after a write that may have been killed.

    Args:
        folder: path.
        entry: str, as passed to `whole_folder`.

    Returns:
        `pathlib.Path`: `folder`, or the complete files of a killed writer.
    """
    complete = _complete(Path(folder), entry)
    return complete if complete.is_dir() else Path(folder)


def refuse_in_use(folder):
    """Raise a `ValueError` unless a folder is empty or does not exist."""
    folder = local(folder)
    if not folder.exists():
        return
    existing = [folder]
    if folder.is_dir():
        existing = [path for path in folder.iterdir() if DRAFT not in path.name]
    if existing:
        names = sorted(path.name for path in existing)
        raise ValueError(
            f"{folder} is in use. Expected: a new or an empty folder. "
            f"Received: one that holds {names[:5]}. Remove it or choose "
            "another."
        )


def sync(path):
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(folder, entry):
    return folder / f".{entry}.new"


def _install(folder, entry, replaced):
    """Link the files of a complete set to their final paths, if there is one.

    They are linked, not moved, so that the set stays complete until the end.
    """
    complete = _complete(folder, entry)
    if not complete.is_dir():
        return
    # The entry is first: else it would refer to files of two writes.
    (folder / entry).unlink(missing_ok=True)
    for pattern in replaced:
        for old in folder.glob(pattern):
            old.unlink()
    files = [path for path in complete.rglob("*") if path.is_file()]
    for file in sorted(files, key=lambda file: file == complete / entry):
        place = folder / file.relative_to(complete)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(file, place)
        except OSError:  # Some file systems have no links.
            shutil.copy(file, place)
        sync(place.parent)
    with draft_folder(folder, DRAFT) as done:
        os.rename(complete, done / "set")
