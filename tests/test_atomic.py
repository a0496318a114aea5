"""A folder is replaced atomically: its writer is killed at every step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_paligemma import atomic

ROOT = Path(__file__).parents[1]
ENTRY = "config.json"
REPLACED = (ENTRY, "data-*", "single")
OLD = {ENTRY: "old", "data-1": "old 1", "data-2": "old 2"}
NEW = {ENTRY: "new", "single": "new", "deep/er/data-1": "new 1"}

# Fork a writer for each step, kill it there, and print the resulting files. A
# step is a call that changes a folder, or the writing of a file.
KILLED = """
import contextlib, itertools, json, os, shutil, sys, tempfile
from pathlib import Path
from keras_paligemma import atomic
from tests.helpers.killing import counted
from tests.test_atomic import ENTRY, NEW, OLD, REPLACED, contents

def write(folder, files, step=lambda: None):
    with atomic.whole_folder(folder, ENTRY, REPLACED) as draft:
        for name, text in files.items():
            step()
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text(text)

home, before, links = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if links == "without":
    def refuse(*args, **kwargs):
        raise OSError("no links here")
    os.link = refuse
for number in itertools.count():
    folder = home / str(number) / "model"
    folder.parent.mkdir()
    if before != "absent":
        folder.mkdir()
        (folder / "notes").mkdir()
        (folder / "notes/mine.txt").write_text("mine")
    if before == "old":
        write(folder, OLD)
    child = os.fork()
    if not child:
        left = [number]
        for name in ("rename", "link", "unlink", "mkdir", "rmdir", "fsync"):
            setattr(os, name, counted(getattr(os, name), left))
        write(folder, NEW, counted(lambda: None, left))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    plain = contents(folder)
    found = contents(atomic.current(folder, ENTRY))
    write(folder, OLD)
    left = [path.name for path in folder.parent.rglob(".*")]
    assert not left, left
    print(json.dumps([killed, plain, found, contents(folder)]))
    if not killed:
        break
"""


def contents(folder):
    """Return the visible files of a folder and their contents."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.relative_to(folder).parts[0].startswith(".")
    }


@pytest.mark.parametrize(
    ("before", "links"),
    [("absent", "with"), ("old", "with"), ("old", "without")],
)
def test_killed_at_every_step(tmp_path, before, links):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), before, links],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    notes = {} if before == "absent" else {"notes/mine.txt": "mine"}
    seen = []
    for line in result.stdout.splitlines():
        killed, plain, found, after = json.loads(line)
        # A complete set that is not yet in place lacks the notes.
        found = {**found, **notes}
        old = OLD | notes if before == "old" else notes
        new = NEW | notes
        assert found in (old, new)
        seen.append("new" if found == new else "old")
        # A reader of the entry finds it with its own files, and the user's
        # notes are always in place.
        assert notes.items() <= plain.items()
        if ENTRY in plain:
            assert plain in (old, new)
        if not killed:
            assert plain == new
        # The next writer replaces any remaining files.
        deep = {key: NEW[key] for key in NEW if "/" in key and key in after}
        assert after == OLD | notes | deep
    # The old files up to some step, and the new files from there on.
    count = seen.count("old")
    assert seen == ["old"] * count + ["new"] * (len(seen) - count)
    assert count > 8 and seen[-1] == "new"
    if before != "absent":
        assert seen.count("new") > 8


def test_nothing_stays_of_a_block_that_raises(tmp_path):
    for folder in (tmp_path / "new" / "model", tmp_path):
        with pytest.raises(KeyboardInterrupt):
            with atomic.whole_folder(folder, ENTRY) as draft:
                (draft / ENTRY).write_text("half")
                assert not (folder / ENTRY).exists()
                raise KeyboardInterrupt
        assert not list(tmp_path.rglob(ENTRY))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_current_directory_stays_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("one", "two"):
        with atomic.whole_folder(".", ENTRY, REPLACED) as draft:
            (draft / ENTRY).write_text(text)
        assert Path(ENTRY).read_text() == text
        assert os.listdir(".") == [ENTRY]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file. Expected: a folder"):
        with atomic.whole_folder(tmp_path / "notes", ENTRY):
            pass
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_is_in_use(tmp_path):
    atomic.refuse_in_use(tmp_path / "new")
    (tmp_path / f"{atomic.DRAFT}left").mkdir()
    atomic.refuse_in_use(tmp_path)
    (tmp_path / "mine").touch()
    for path in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ValueError, match=r"in use.*\['mine'\]"):
            atomic.refuse_in_use(path)


def test_drafts_are_deleted_when_their_writer_is_dead(tmp_path):
    """That of a living writer stays, and what only looks like a draft."""
    for name in (".a.draft-01234567", ".a.draft-mine", ".b.draft-01234567"):
        (tmp_path / name).mkdir()
    with atomic.draft_folder(tmp_path, ".a.draft-") as first:
        with atomic.draft_folder(tmp_path, ".a.draft-") as second:
            found = {path.name for path in tmp_path.iterdir()}
            others = {".a.draft-mine", ".b.draft-01234567"}
            assert found == {first.name, second.name} | others
    assert {path.name for path in tmp_path.iterdir()} == others


def test_no_draft_is_deleted_where_there_are_no_locks(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".a.draft-01234567").mkdir()
    with atomic.whole_folder(tmp_path / "a", ENTRY) as draft:
        (draft / ENTRY).touch()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a", ".a.draft-01234567"}


@pytest.mark.parametrize("path", ["gs://bucket/a", Path("hf://me/a"), "s3://b"])
def test_an_address_is_no_folder(tmp_path, monkeypatch, path):
    """It would become a local folder of the name "gs:"."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Received: an address, '[a-z0-9]+://"):
        with atomic.whole_folder(path, ENTRY):
            pass
    with pytest.raises(ValueError, match="of this machine"):
        atomic.refuse_in_use(path)
    assert not os.listdir(tmp_path)
    assert atomic.local("gs/a:b") == Path("gs/a:b")


@pytest.mark.parametrize("path", ["", "~nobody_of_this_name/a"], ids=repr)
def test_no_path_of_a_file(path):
    """An empty one, of a variable that is not set, is no current folder."""
    with pytest.raises(ValueError, match=f"Received: '{path}'"):
        atomic.local(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "settings.json"
    for _ in range(2):  # A draft that a killed writer left is replaced.
        with atomic.whole_file(path) as draft:
            draft.write_text("old")
            assert draft.parent == tmp_path
        (tmp_path / draft.name).write_text("left")
    with pytest.raises(OSError), atomic.whole_file(path) as draft:
        assert not draft.exists()
        draft.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
