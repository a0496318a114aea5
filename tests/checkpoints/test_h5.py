"""Keras weight files, intact and damaged."""

import json
import subprocess
import sys
import weakref

import h5py
import ml_dtypes
import numpy as np
import pytest

from keras_paligemma import atomic
from keras_paligemma.checkpoints.storage import h5

BFLOAT16 = ml_dtypes.bfloat16


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {
        "layers/dense/vars/0": random.normal(size=(5, 7)).astype("float32"),
        "layers/dense/vars/1": random.normal(size=(7,)).astype("float16"),
        "layers/dense_1/vars/0": random.normal(size=(7, 3)).astype(BFLOAT16),
        "vars/0": np.array(2.5, "float64"),
    }


def read_all(*paths):
    with h5.open_h5(paths) as found:
        return found.dtypes, {key: found.read(key) for key in found.shapes}


def same(found, arrays):
    """Return whether names, dtypes and bits are equal."""
    return found.keys() == arrays.keys() and all(
        found[key].dtype == arrays[key].dtype
        and found[key].shape == arrays[key].shape
        and found[key].tobytes() == arrays[key].tobytes()
        for key in arrays
    )


@pytest.mark.parametrize("shard_size", [10**6, 100])
def test_written_is_read(arrays, tmp_path, shard_size):
    count = h5.write_h5(tmp_path, arrays.items(), shard_size)
    assert count == 35 + 7 + 21 + 1
    # One array has 140 bytes, more than the smaller shard size, so it has a
    # shard of its own.
    sharded = ["model.weights.json"]
    sharded += [f"model_0000{number}.weights.h5" for number in range(2)]
    names = sharded if shard_size == 100 else ["model.weights.h5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    if shard_size == 100:
        index = json.loads((tmp_path / names[0]).read_text())
        total = sum(array.nbytes for array in arrays.values())
        assert index["metadata"] == {"total_size": total}
    dtypes, found = read_all(tmp_path / names[0])
    assert same(found, arrays)
    assert dtypes == {key: array.dtype.name for key, array in arrays.items()}


def test_arrays_in_any_memory_order(tmp_path):
    array = np.arange(6, dtype=BFLOAT16).reshape(2, 3).T
    h5.write_h5(tmp_path, [("vars/0", array)])
    _, found = read_all(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(found["vars/0"], array)


def test_one_array_at_a_time(tmp_path):
    alive = []

    def arrays():
        for number in range(3):
            array = np.zeros(4)
            alive.append(weakref.ref(array))
            yield f"vars/{number}", array
            del array
            assert alive[-1]() is None

    h5.write_h5(tmp_path, arrays())
    assert len(alive) == 3


def test_nothing_stays_of_an_interrupted_write(tmp_path):
    def arrays():
        yield "vars/0", np.zeros(4)
        yield "vars/1", np.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with atomic.whole_folder(tmp_path / "preset", "config.json") as draft:
            h5.write_h5(draft, arrays(), shard_size=8)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_written_over(arrays, tmp_path):
    h5.write_h5(tmp_path, arrays.items())
    with pytest.raises(ValueError, match="model.weights.h5. Expected"):
        h5.write_h5(tmp_path, arrays.items(), shard_size=100)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def not_h5(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def missing(path):
    path.unlink()


def quantized(path):
    with h5py.File(path, "w") as file:
        file["vars/0"] = np.zeros(3, "int8")


def unknown_bytes(path):
    with h5py.File(path, "w") as file:
        file["vars/0"] = np.zeros(3, "V2")


def without_values(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("vars/0", (3,), "float32")


def without_shape(path):
    with h5py.File(path, "w") as file:
        file["vars/0"] = h5py.Empty("float32")


def external(path):
    path.with_name("other").write_bytes(bytes(12))
    with h5py.File(path, "w") as file:
        place = [(path.with_name("other"), 0, 12)]
        file.create_dataset("vars/0", (3,), "float32", external=place)


def virtual(path):
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["x"] = np.zeros(3)
    layout = h5py.VirtualLayout((3,), "float64")
    layout[:] = h5py.VirtualSource(path.with_name("other.h5"), "x", (3,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("vars/0", layout)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "truncated"),
        (not_h5, "signature not found"),
        (missing, "No such file"),
        (quantized, "vars/0 holds int8"),
        (unknown_bytes, "vars/0 holds None"),
        (without_values, "holds no values"),
        (without_shape, "holds no values"),
        (external, "lies in another file"),
        (virtual, "lies in another file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named(arrays, tmp_path, damage, says):
    h5.write_h5(tmp_path, arrays.items())
    path = tmp_path / "model.weights.h5"
    damage(path)
    with pytest.raises(ValueError, match=f"model.weights.h5 .*{says}"):
        read_all(path)


def test_links_are_not_followed(arrays, tmp_path):
    h5.write_h5(tmp_path, arrays.items())
    path = tmp_path / "links.h5"
    with h5py.File(path, "w") as file:
        file["vars/0"] = np.zeros(3)
        file["vars/1"] = h5py.ExternalLink("model.weights.h5", "vars/0")
        file["vars/2"] = h5py.SoftLink("/vars/0")
    _, found = read_all(path)
    assert list(found) == ["vars/0"]


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", "a `weight_map` of"),
        ('{"weight_map": []}', "a `weight_map` of"),
        ('{"weight_map": {}}', "a `weight_map` of"),
        ('{"weight_map": {"/vars": 3}}', "names 3"),
        ('{"weight_map": {"/vars": [null]}}', "names None"),
        (
            '{"weight_map": {"/vars": "../model_00000.weights.h5"}}',
            "names '../",
        ),
        ('{"weight_map": {"/vars": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"weight_map": {"/vars": ".."}}', "cannot be read"),
        ('{"weight_map": {"/vars": ""}}', "names ''"),
        ('{"weight_map": {"/vars": "model_7.weights.h5"}}', "model_7.weights"),
    ],
)
def test_damaged_index_is_named(arrays, tmp_path, index, says):
    # The file that the index must not reach exists and is valid.
    h5.write_h5(tmp_path, arrays.items(), shard_size=100)
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.weights.json"
    path.write_text(index)
    with pytest.raises(ValueError, match=says):
        read_all(path)


def test_an_array_in_two_shards_is_refused(arrays, tmp_path):
    h5.write_h5(tmp_path, arrays.items(), shard_size=100)
    again = (tmp_path / "model_00000.weights.h5").read_bytes()
    (tmp_path / "model_00002.weights.h5").write_bytes(again)
    path = tmp_path / "model.weights.json"
    index = json.loads(path.read_text())
    index["weight_map"]["/again"] = ["model_00002.weights.h5"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds layers/dense/vars/0 as well"):
        read_all(path)


DAMAGE = """
import pathlib, sys
import numpy as np
from keras_paligemma.checkpoints.storage import h5

path = pathlib.Path(sys.argv[1])
whole = path.read_bytes()
with h5.open_h5([path]) as found:
    shapes = dict(found.shapes)
outcomes = {"refused": 0, "missing": 0, "read": 0}
for seed in range(300):
    random = np.random.default_rng(seed)
    damaged = np.frombuffer(whole, "uint8").copy()
    if seed % 3 == 0:
        damaged = damaged[: random.integers(len(damaged))]
    else:
        # Every other case hits the head of the file, which is all structure.
        end = len(damaged) if seed % 3 == 1 else 2048
        where = random.integers(end, size=random.integers(1, 9))
        damaged[where] ^= random.integers(1, 256, len(where), dtype="uint8")
    path.write_bytes(damaged.tobytes())
    print(seed, file=sys.stderr, flush=True)
    try:
        with h5.open_h5([path]) as found:
            # As the engine does: nothing is read unless all shapes fit.
            if found.shapes != shapes:
                outcomes["missing"] += 1
                continue
            for key in shapes:
                assert found.read(key).shape == shapes[key]
            outcomes["read"] += 1
    except ValueError as error:
        assert str(path) in str(error)
        outcomes["refused"] += 1
print(*outcomes.values())
"""


def test_damaged_bytes_give_an_error_or_values(arrays, tmp_path):
    """HDF5 files have no checksum, so changed values are not detected.

    The test runs in its own process because the library is written in C, and a
    crash would end the other tests.
    """
    h5.write_h5(tmp_path, arrays.items())
    result = subprocess.run(
        [sys.executable, "-c", DAMAGE, tmp_path / "model.weights.h5"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    counts = [int(count) for count in result.stdout.split()]
    assert sum(counts) == 300
    # There are 100 truncations alone.
    assert counts[0] >= 100 and counts[2] > 0
