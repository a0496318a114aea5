"""Checkpoints on a disk that fails, during writing or later."""

import contextlib
import resource
import shutil
import warnings

import numpy as np
import pytest

from keras_paligemma.training.checkpoint_files import CheckpointFiles

ARRAYS = {
    step: {
        # Too large to be stored in the index, which has its own checksums.
        "state": [np.random.default_rng(step).normal(size=(60, 70))],
        "more": {"few": np.arange(step, dtype="float32")},
    }
    for step in (1, 2)
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    files = CheckpointFiles(folder, keep=2)
    for step, arrays in ARRAYS.items():
        files.write(step, {"batches": step}, arrays)
    return folder


def read(folder):
    """Compare arrays; return the step that was read, and the warnings."""
    files = CheckpointFiles(folder, keep=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step, description, found = files.read_newest(
            lambda step, description: ARRAYS[step]
        )
    assert description == {"batches": step}
    np.testing.assert_array_equal(found["state"], ARRAYS[step]["state"])
    np.testing.assert_array_equal(
        found["more"]["few"], ARRAYS[step]["more"]["few"]
    )
    told = [str(warning.message) for warning in warned]
    return step, [text for text in told if "Damaged checkpoints" in text]


def flip(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    ),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": flip,
    "other JSON": lambda path: path.write_bytes(b"{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_file_of_the_newest(written, tmp_path, damage):
    """Values are correct for any damage, with a warning if they are older."""
    names = [
        path.relative_to(written)
        for path in (written / "2").rglob("*")
        if path.is_file()
    ]
    steps = []
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        DAMAGES[damage](folder / name)
        step, told = read(folder)
        steps.append(step)
        assert len(told) == (step == 1), name
        if step == 1:
            assert "step 2 (" in told[0] and "goes on after step 1" in told[0]
            assert (folder / "damaged-2.0").is_dir()
            assert not (folder / "2").exists()
    # Files that Orbax does not read may be damaged.
    assert 1 in steps


def test_a_flipped_bit_of_values_is_seen(written, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    files = [path for path in (folder / "2").rglob("*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size))
    step, (told,) = read(folder)
    assert step == 1 and "Values of 'state' are not those written" in told
    # The same step can be written and damaged again.
    again = CheckpointFiles(folder, keep=2)
    again.write(2, {"batches": 2}, ARRAYS[2])
    assert read(folder) == (2, [])
    (folder / "2" / "place" / "metadata").unlink()
    assert read(folder)[0] == 1
    assert (folder / "damaged-2.1").is_dir()


def test_none_is_whole(written, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    for step in "12":
        (folder / step / "place" / "metadata").write_text("{")
    # No files are moved, so that the next start does not train from scratch.
    for _ in range(2):
        with pytest.raises(ValueError, match="can be read.*step 2.*step 1"):
            read(folder)
    for step in "12":
        (folder / step / "_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(ValueError, match="cannot be listed.*Move the newest"):
        read(folder)


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room(written, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(written, folder)
    files = CheckpointFiles(folder, keep=2)
    large = {"state": [np.random.default_rng(0).normal(size=10**6)]}
    with files_of_at_most(10**6), pytest.raises(OSError) as raised:
        files.write(3, {}, large)
    message = str(raised.value)
    assert "step 3 could not be written" in message and len(message) < 800
    assert "bytes are free" in message and "goes on after step 2" in message
    assert raised.value.__suppress_context__
    assert read(folder) == (2, [])
