"""Folders that are found whole or not at all, whenever their writer dies."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

DRAFT = ".draft-"


@contextlib.contextmanager
def whole_folder(folder, entry, replaced=()):
    """Write files so that they appear in a folder all at once.

    A folder that is not there is written beside and renamed. Into one that is
    there the files are written as a draft, which one rename makes a complete
    set, `.ENTRY.new`; then they get their places, the entry last, and the set
    goes. The folder itself is never moved and no file of another name touched,
    so that it may be a mount, a current directory, or hold notes of a user.

    Killed at any time, `current` finds the old files, whole, or the new ones,
    whole. A reader that knows nothing of it finds them too, or for the moment
    of the last steps no entry. A killed writer may leave a hidden folder
    `.draft-*`, which nobody reads; what is left of a complete set is put in
    place by the next writer. Two writers of one folder are not kept apart.

    Args:
        folder: path.
        entry: str, the file without which readers take the folder for
            nothing.
        replaced: patterns of names that an earlier write may have left: these
            files go when the new ones are complete.

    Yields:
        `pathlib.Path` of the draft, an empty folder to write into. Should the
        block raise, nothing is left of it.

    Example:

    ```python
    with whole_folder("model", "config.json", ["*.safetensors"]) as draft:
        (draft / "config.json").write_text("{}")
    ```
    """
    folder = Path(folder).expanduser().resolve()
    there = folder.exists()
    if there:
        _install(folder, entry, replaced)
        home, prefix = folder, DRAFT
    else:
        home, prefix = folder.parent, f".{folder.name}{DRAFT}"
        home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        draft.chmod(0o755)
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        os.rename(draft, _complete(folder, entry) if there else folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(home)
    _install(folder, entry, replaced)


def current(folder, entry):
    """Return the folder to read: the complete set, if its writer was killed.

    Args:
        folder: path.
        entry: str, as it was written.
    """
    complete = _complete(Path(folder), entry)
    return complete if complete.is_dir() else Path(folder)


def refuse_in_use(folder):
    """Raise a `ValueError` unless a folder is empty or not there."""
    folder = Path(folder).expanduser()
    if not folder.exists():
        return
    held = [folder]
    if folder.is_dir():
        held = [one for one in folder.iterdir() if DRAFT not in one.name]
    if held:
        names = sorted(one.name for one in held)
        raise ValueError(
            f"{folder} is in use. Expected: a new or an empty folder. "
            f"Received: one that holds {names[:5]}. Remove it or choose "
            "another."
        )


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(folder, entry):
    return folder / f".{entry}.new"


def _install(folder, entry, replaced):
    """Give the files of a complete set their places, if there is one.

    They are linked, not moved: the set stays complete until all are there.
    """
    complete = _complete(folder, entry)
    if not complete.is_dir():
        return
    # First: else it would name files of two writes.
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
    done = tempfile.mkdtemp(prefix=DRAFT, dir=folder)
    os.rename(complete, Path(done) / "set")
    shutil.rmtree(done)
