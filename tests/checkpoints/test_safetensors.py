"""Safetensors files: shards, their index, and damaged files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_paligemma.checkpoints.storage.safetensors import INDEX
from keras_paligemma.checkpoints.storage.safetensors import SINGLE
from keras_paligemma.checkpoints.storage.safetensors import find
from keras_paligemma.checkpoints.storage.safetensors import open_safetensors
from keras_paligemma.checkpoints.storage.safetensors import write_safetensors

ARRAYS = {
    "a.weight": np.arange(35, dtype="float32").reshape(5, 7),
    "b.weight": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "c.weight": np.arange(11, dtype="float16"),
}


def read_all(paths):
    with open_safetensors(paths) as tensors:
        return {key: tensors.read(key) for key in tensors.shapes}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


@pytest.mark.parametrize(
    ("size", "shards"),
    [
        (10**6, [["a.weight", "b.weight", "c.weight"]]),
        (140 + 12, [["a.weight", "b.weight"], ["c.weight"]]),
        (140 + 11, [["a.weight"], ["b.weight", "c.weight"]]),
        (1, [["a.weight"], ["b.weight"], ["c.weight"]]),
    ],
)
def test_shards_hold_what_fits(tmp_path, size, shards):
    keys = write_safetensors(tmp_path, ARRAYS.items(), size)
    assert keys == list(ARRAYS)
    paths = find(tmp_path)
    assert_equal(read_all(paths), ARRAYS)
    for path, wanted in zip(paths, shards, strict=True):
        with safe_open(path, framework="numpy") as file:
            assert sorted(file.keys()) == wanted
            assert file.metadata() == {"format": "pt"}
        assert path.stat().st_mode & 0o777 == 0o644
    names = [path.name for path in paths]
    if len(shards) == 1:
        assert names == [SINGLE] == [p.name for p in tmp_path.iterdir()]
        return
    assert names[0] == f"model-00001-of-0000{len(shards)}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 140 + 12 + 22
    assert index["weight_map"] == {
        key: name
        for keys, name in zip(shards, names, strict=True)
        for key in keys
    }
    assert {p.name for p in tmp_path.iterdir()} == {*names, INDEX}


def test_arrays_are_asked_for_one_shard_at_a_time(tmp_path):
    """When an array is requested, all earlier shards are on disk."""
    seen = []

    def arrays():
        for key, array in ARRAYS.items():
            seen.append(len(list(tmp_path.iterdir())))
            yield key, array

    write_safetensors(tmp_path, arrays(), 1)
    assert seen == [0, 1, 2]


def test_views_are_written_as_they_read(tmp_path):
    view = ARRAYS["a.weight"].T[::2]
    write_safetensors(tmp_path, [("view", view)])
    assert_equal(read_all(find(tmp_path)), {"view": view})


def test_some_rows_of_a_tensor(tmp_path):
    write_safetensors(tmp_path, ARRAYS.items())
    with open_safetensors(find(tmp_path)) as tensors:
        for key, array in ARRAYS.items():
            rows = tensors.read_rows(key, 1, 4)
            assert rows.dtype == array.dtype
            np.testing.assert_array_equal(rows, array[1:4])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ([("a", np.zeros(2))] * 2, "'a' comes twice"),
        ([("a", np.zeros(2, "int32"))], "'a' is an array of int32"),
    ],
)
def test_what_cannot_be_written(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=match):
        write_safetensors(tmp_path, iter(arrays))


def test_no_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=f"Expected: {SINGLE}"):
        find(tmp_path)


def test_missing_shards_are_all_listed(tmp_path):
    write_safetensors(tmp_path, ARRAYS.items(), 1)
    shards = find(tmp_path)
    shards[0].unlink()
    shards[2].unlink()
    with pytest.raises(ValueError, match="lacks 2 of the 3") as error:
        find(tmp_path)
    assert shards[0].name in str(error.value)
    assert shards[1].name not in str(error.value)
    assert shards[2].name in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "x/../../secret.safetensors"}}',
        '{"weight_map": {"a": "nul\\u0000.safetensors"}}',
        '{"weight_map": {"a": "half\\ud800.safetensors"}}',
        '{"weight_map": {"a": "%s.safetensors"}}' % ("x" * 250),
        '{"weight_map": ' + 100_000 * "[" + 100_000 * "]" + "}",
    ],
)
def test_a_bad_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        find(tmp_path)


def test_an_index_of_very_many_files(tmp_path):
    names = {str(number): f"{number}.safetensors" for number in range(50_000)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="lacks 50000 of the 50000") as error:
        find(tmp_path)
    assert len(str(error.value)) < 500


def test_links_out_of_the_folder_are_followed(tmp_path):
    """A hub's cache is a folder of links to files named by their hash."""
    write_safetensors(tmp_path, ARRAYS.items())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / SINGLE).symlink_to(tmp_path / SINGLE)
    assert_equal(read_all(find(tmp_path / "cache")), ARRAYS)


def test_a_key_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"a": np.zeros(3, "float32")}, tmp_path / name)
    with pytest.raises(ValueError, match="both hold 'a'"):
        read_all([tmp_path / "one", tmp_path / "two"])


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(offsets=(0, 9))},
        {"a": entry(offsets=(8, 0))},
        {"a": entry(offsets=(-8, 0))},
        {"a": entry(offsets=(8, 16))},
        {"a": entry(offsets=(2**62, 2**62 + 8))},
        {"a": entry(), "b": entry()},
        {"a": entry(), "b": entry(offsets=(4, 12))},
        {"a": entry(shape=(3,))},
        {"a": entry(shape=(2**40, 2**40))},
        {"a": entry(shape=(-2,))},
        {"a": entry("F99")},
        {"a": entry("I32")},
        {"a": entry("F8_E4M3", (8,))},
        {"a": {}},
        {},
        [],
    ],
    ids=str,
)
def test_bad_headers_are_named(tmp_path, header):
    path = tmp_path / SINGLE
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=str(path)):
        read_all([path])


@pytest.mark.parametrize("length", [0, 3, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(tmp_path, length):
    write_safetensors(tmp_path, ARRAYS.items())
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=str(path)):
        read_all([path])


def test_every_truncation_is_an_error(tmp_path):
    write_safetensors(tmp_path, ARRAYS.items())
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            read_all([path])


def test_flipped_bytes_are_an_error_or_arrays(tmp_path):
    """Damaged values alone cannot be detected."""
    write_safetensors(tmp_path, ARRAYS.items())
    path = tmp_path / SINGLE
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(2_000):
        damaged = bytearray(whole)
        for index in random.integers(0, start, random.integers(1, 4)):
            damaged[index] ^= random.integers(1, 256)
        path.write_bytes(damaged)
        try:
            arrays = read_all([path])
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        # Names may change, and so may shapes and dtypes of the same size.
        assert sum(array.nbytes for array in arrays.values()) == (
            len(whole) - start
        )
    assert 1_000 < refused < 2_000
    for index in random.integers(start, len(whole), 200):
        damaged = bytearray(whole)
        damaged[index] ^= random.integers(1, 256)
        path.write_bytes(damaged)
        arrays = read_all([path])
        assert {key: array.shape for key, array in arrays.items()} == {
            key: array.shape for key, array in ARRAYS.items()
        }


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=str(path)):
            read_all([path])
