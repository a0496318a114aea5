"""Files in the original's format: read, written and refused."""

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.checkpoints.storage.npz import find_pieces
from keras_paligemma.checkpoints.storage.npz import open_npz
from keras_paligemma.checkpoints.storage.npz import write_npz

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MB = 1 << 20

CENTRAL, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"


@pytest.fixture
def arrays():
    """Return arrays of every dtype and form, including raw bytes."""
    bits = np.random.default_rng(0).bytes
    result = {
        f"params/{name}/kernel:0": np.frombuffer(
            bits(15 * np.dtype(name).itemsize), name
        ).reshape(5, 3)
        for name in npz.NAMES
    }
    halves = np.frombuffer(bits(48), BFLOAT16)
    wide = np.frombuffer(bits(96), "float32").reshape(2, 3, 4)
    return result | {
        "params/bfloat16": halves.reshape(2, 3, 4),
        "scalar": np.float32(-0.0).reshape(()),
        "step": np.array(7, BFLOAT16),
        "empty": np.zeros((3, 0, 2), "float16"),
        "fortran": np.asfortranarray(wide),
        "fortran_bfloat16": np.asfortranarray(halves.reshape(4, 6)),
        "strided": wide[:, ::2].transpose(2, 0, 1),
        "a name/of two words, ä": wide[0],
    }


def load(path):
    """Read all arrays of a file, or of the pieces it belongs to."""
    with open_npz(find_pieces(path)) as tensors:
        arrays = {key: tensors.read(key) for key in tensors.shapes}
        for key, array in arrays.items():
            assert array.shape == tensors.shapes[key]
            assert str(array.dtype) == tensors.dtypes[key]
        return arrays


def assert_same(actual, wanted):
    """Compare bits, so that NaN equals NaN and zeros have a sign."""
    assert list(actual) == list(wanted)
    for key, array in wanted.items():
        assert actual[key].dtype == array.dtype, key
        assert actual[key].shape == array.shape, key
        assert actual[key].tobytes() == array.tobytes(), key


def refused(path, *words):
    """Check that a file is refused with its name and these words."""
    with pytest.raises(ValueError) as caught:
        load(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def npy(array, **kwargs):
    """Return the bytes of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def craft(path, *members, compression=zipfile.ZIP_STORED):
    """Write a zip file from pairs of name and bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def patch(path, record, offset, form, value):
    """Overwrite a field of the first record of a kind."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, data.index(record) + offset, value)
    path.write_bytes(data)


def cut(path, count, numbered=True):
    """Split a file into pieces by bytes."""
    data = path.read_bytes()
    path.unlink()
    size = -(-len(data) // count)
    pieces = []
    for index in range(count):
        name = (
            f"part-{index:05d}-of-{count:05d}" if numbered else f"part{index}"
        )
        pieces.append(path.with_name(f"{path.name}.{name}"))
        pieces[-1].write_bytes(data[index * size : (index + 1) * size])
    return pieces


# Reading and writing.


def test_the_home_folder_and_new_folders(tmp_path, arrays, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz("~/new/x.npz", arrays.items())
    assert (tmp_path / "new" / "x.npz").is_file()


@pytest.mark.parametrize("piece_size", [None, 700, 10**9])
def test_roundtrip(tmp_path, arrays, piece_size):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items(), piece_size)
    assert_same(load(path), arrays)
    with open_npz(find_pieces(path)) as tensors:
        assert tensors.dtypes["params/bfloat16"] == "bfloat16"


def test_numpy_reads_what_is_written(tmp_path, arrays):
    write_npz(tmp_path / "x.npz", arrays.items())
    with np.load(tmp_path / "x.npz") as file:
        theirs = dict(file)
    for key, array in arrays.items():
        if array.dtype == BFLOAT16:
            assert theirs[key].dtype == np.dtype("V2")
            theirs[key] = theirs[key].view(BFLOAT16)
    assert_same(theirs, arrays)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, arrays, save):
    save(tmp_path / "x.npz", **arrays)
    assert_same(load(tmp_path / "x.npz"), arrays)


def test_pieces_are_the_bytes_of_the_whole(tmp_path, arrays):
    write_npz(tmp_path / "x.npz", arrays.items())
    write_npz(tmp_path / "y.npz", arrays.items(), 1000)
    pieces = find_pieces(tmp_path / "y.npz")
    assert len(pieces) > 3
    assert {piece.stat().st_size for piece in pieces[:-1]} == {1000}
    joined = b"".join(piece.read_bytes() for piece in pieces)
    assert joined == (tmp_path / "x.npz").read_bytes()


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_later_versions_of_the_header(tmp_path, version):
    array = np.arange(6.0).reshape(2, 3)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    craft(tmp_path / "x.npz", ("a.npy", file.getvalue()))
    assert_same(load(tmp_path / "x.npz"), {"a": array})


def test_fields_of_the_header_in_another_order(tmp_path):
    header = b"{'shape': (2,), 'fortran_order': False, 'descr': '<f4'}\n"
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    craft(tmp_path / "x.npz", ("a.npy", data + struct.pack("<2f", 1, 2)))
    wanted = {"a": np.array([1, 2], "float32")}
    assert_same(load(tmp_path / "x.npz"), wanted)


def test_an_array_can_be_read_again_and_changed(tmp_path):
    write_npz(tmp_path / "x.npz", [("a", np.arange(4)), ("b", np.ones(2))])
    with open_npz([tmp_path / "x.npz"]) as tensors:
        first = tensors.read("a")
        first += 1
        assert tensors.read("b").tolist() == [1, 1]
        assert tensors.read("a").tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="closed"):
        tensors.read("a")


@pytest.mark.parametrize("name", ["tiny_headdim.npz", "tiny_headdim.b16.npz"])
def test_golden(name):
    with np.load(GOLDEN / name) as file:
        wanted = dict(file)
    if ".b16." in name:
        wanted = {key: value.view(BFLOAT16) for key, value in wanted.items()}
    assert len(wanted) == 34
    assert_same(load(GOLDEN / name), wanted)


def test_golden_pieces_equal_the_whole():
    whole = GOLDEN / "tiny_headdim.b16.npz"
    piece = GOLDEN / "tiny_headdim.b16.npz.part-00001-of-00003"
    assert find_pieces(whole) == [whole]
    assert len(find_pieces(piece)) == 3
    assert_same(load(piece), load(whole))


# Cost.


@pytest.fixture
def bytes_read(monkeypatch):
    """Return a list of the number of bytes that each read took from disk."""
    counts = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            counts.append(super().readinto(buffer))
            return counts[-1]

        def read(self, *args):
            raise AssertionError("A read that is not counted.")

        readall = read

    monkeypatch.setattr(io, "FileIO", Counting)
    return counts


@pytest.mark.parametrize("form", ["whole", "pieces", "deflated"])
def test_bytes_read(tmp_path, bytes_read, form):
    path = GOLDEN / "tiny_headdim.b16.npz"
    with np.load(path) as file:
        arrays = dict(file)
    if form == "pieces":
        path = GOLDEN / "tiny_headdim.b16.npz.part-00000-of-00003"
    if form == "deflated":
        path = tmp_path / "x.npz"
        np.savez_compressed(path, **arrays)
    bytes_read.clear()
    paths = find_pieces(path)
    size = sum(path.stat().st_size for path in paths)
    with open_npz(paths) as tensors:
        opened = sum(bytes_read)
        for key in tensors.shapes:
            tensors.read(key)
    assert 0.99 * size <= sum(bytes_read) <= 1.02 * size
    if form != "deflated":
        values = sum(array.nbytes for array in arrays.values())
        # The end of the directory is read twice, and the part before it once.
        assert opened <= size - values + 64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_of_a_read(tmp_path, save):
    array = np.random.default_rng(0).integers(0, 9, 8 * MB, "uint8")
    save(tmp_path / "x.npz", a=array)
    with open_npz([tmp_path / "x.npz"]) as tensors:
        tracemalloc.start()
        read = tensors.read("a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (read == array).all()
    assert 8 * MB <= peak <= 12 * MB


def test_memory_of_a_write(tmp_path):
    def arrays():
        for index in range(2):
            yield str(index), np.full(24 * MB, index, "uint8")

    tracemalloc.start()
    write_npz(tmp_path / "x.npz", arrays(), piece_size=10 * MB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One array, plus the 16 MB that NumPy writes at a time.
    assert 24 * MB <= peak <= 42 * MB
    assert len(find_pieces(tmp_path / "x.npz")) == 5


# Which files belong together.


@pytest.mark.parametrize("numbered", [True, False])
def test_pieces_are_found_from_the_stem_or_any_piece(tmp_path, numbered):
    path = tmp_path / "x[1].npz"
    write_npz(path, [("a", np.arange(99))])
    (tmp_path / "x[1].npz2").touch()
    (tmp_path / "y.npz.part-00000-of-00001").touch()
    pieces = cut(path, 3, numbered)
    for file in [path, *pieces]:
        assert find_pieces(file) == find_pieces(str(file)) == pieces
    assert_same(load(path), {"a": np.arange(99)})
    with open_npz(pieces[::-1]) as tensors:
        assert tensors.shapes == {"a": (99,)}


def test_no_such_file(tmp_path):
    refused(tmp_path / "x.npz", "does not exist")
    refused(tmp_path / "nowhere" / "x.npz", "does not exist")
    refused(tmp_path / "x.npz.part-00000-of-00002", "does not exist")
    write_npz(tmp_path / "x.npz", [("a", np.arange(9))], 200)
    refused(tmp_path / "x.npz.part-00000-of-00009", "does not exist")
    with pytest.raises(ValueError, match="not the pieces of one file"):
        with open_npz([]):
            pass


def test_no_directory(tmp_path):
    (tmp_path / "x.npz").mkdir()
    refused(tmp_path / "x.npz", "does not exist")
    with pytest.raises(ValueError, match="x.npz cannot be read: .*directory"):
        with open_npz([tmp_path / "x.npz"]):
            pass


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("numbered", [True, False])
def test_a_missing_piece(tmp_path, arrays, index, numbered):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    piece = cut(path, 3, numbered)[index]
    piece.unlink()
    if numbered:
        refused(path, f"missing (at most ten are shown): ['{piece}']")
        there = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match="is not whole"):
            with open_npz(there):
                pass
    else:
        refused(path, "cannot be read")


def test_a_missing_piece_among_a_billion(tmp_path):
    piece = tmp_path / "x.npz.part-00000-of-999999999999"
    piece.touch()
    refused(tmp_path / "x.npz", "expected 999999999999 pieces, received 1")


def test_a_piece_that_is_there_twice(tmp_path, arrays):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    piece = cut(path, 3)[1]
    double = tmp_path / "x.npz.part-1-of-00003"
    double.write_bytes(piece.read_bytes())
    refused(path, f"there twice: ['{double}']")


def test_a_piece_beyond_the_last(tmp_path, arrays):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    cut(path, 3)[2].rename(tmp_path / "x.npz.part-00003-of-00003")
    refused(path, "00002-of-00003'], there", "beyond the last: ['")


@pytest.mark.parametrize(
    "other", ["-00003-of-00004", "-00001-of-00003.tmp", "2"]
)
def test_pieces_of_two_sets(tmp_path, arrays, other):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    cut(path, 3)
    (tmp_path / f"x.npz.part{other}").touch()
    with pytest.raises(ValueError, match=f"part{other}.*not the pieces of one"):
        find_pieces(path)


def test_swapped_pieces(tmp_path, arrays):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    pieces = cut(path, 4)
    contents = [piece.read_bytes() for piece in pieces]
    for first, two in [(0, 1), (0, 2), (1, 2), (0, 3), (2, 3)]:
        swapped = list(contents)
        swapped[first], swapped[two] = contents[two], contents[first]
        for piece, data in zip(pieces, swapped, strict=True):
            piece.write_bytes(data)
        refused(path, "cannot be read")


# Damage.


def test_truncated(tmp_path, arrays):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    data = path.read_bytes()
    for length in (0, 1, 21, 22, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "cannot be read", "Copy it again")


def test_a_truncated_piece(tmp_path, arrays):
    path = tmp_path / "x.npz"
    write_npz(path, arrays.items())
    for piece in cut(path, 3):
        data = piece.read_bytes()
        piece.write_bytes(data[:-1])
        refused(path, "cannot be read")
        piece.write_bytes(data)
    load(path)


def test_no_zip(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(npy(np.arange(9)))
    refused(path, "not a zip")


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
)
@pytest.mark.parametrize("values", [0, 1, 63, 64, 65, 128])
def test_a_flipped_byte_of_the_values(
    tmp_path, monkeypatch, compression, values
):
    # The sizes end before, at and after a chunk boundary: the last chunk must
    # be checked too.
    monkeypatch.setattr(npz, "CHUNK", 64)
    path = tmp_path / "x.npz"
    array = np.random.default_rng(0).integers(0, 99, values, "uint8")
    craft(path, ("a.npy", npy(array)), compression=compression)
    assert_same(load(path), {"a": array})
    data = path.read_bytes()
    # Corrupt the last stored byte or one of the last deflated bytes, and the
    # checksum.
    last = data.index(CENTRAL) - 1 - 4 * (compression != zipfile.ZIP_STORED)
    for at in (last, data.index(CENTRAL) + 16):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refused(path, "'a.npy'")


def test_damage_names_the_piece(tmp_path):
    path = tmp_path / "x.npz"
    write_npz(path, [(key, np.arange(1000)) for key in "abc"], 3000)
    pieces = find_pieces(path)
    data = bytearray(pieces[4].read_bytes())
    data[1500] ^= 1
    pieces[4].write_bytes(data)
    with open_npz(pieces) as tensors:
        tensors.read("a")
        with pytest.raises(ValueError) as caught:
            tensors.read("b")
        # Reading again fails again.
        with pytest.raises(ValueError, match="CRC"):
            tensors.read("b")
    message = str(caught.value)
    assert message.startswith(f"{pieces[2]} to {pieces[5]}: member 'b.npy'")


def test_a_hidden_member(tmp_path):
    path = craft(
        tmp_path / "x.npz",
        ("a.npy", npy(np.arange(9))),
        ("b.npy", npy(np.arange(9))),
    )
    # The first entry's comment swallows the second entry.
    patch(path, CENTRAL, 32, "<H", 46 + len("b.npy"))
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["a.npy"]
    refused(path, "directory of 2 members", "received 1")


def test_a_directory_of_size_zero(tmp_path):
    path = craft(tmp_path / "x.npz", ("a.npy", npy(np.arange(9))))
    patch(path, END, 12, "<L", 0)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == []
    refused(path, "directory of 1 members", "received 0")


def test_a_pickle_is_not_run(tmp_path):
    marker = tmp_path / "was run"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    trap = np.array([Trap()], object)
    path = craft(tmp_path / "x.npz", ("a.npy", npy(trap, allow_pickle=True)))
    refused(path, "'a.npy'")
    # The size is consistent, but the dtype is still object.
    data = npy(np.zeros(1)).replace(b"'<f8'", b"'|O' ")
    craft(path, ("a.npy", data))
    refused(path, "'a.npy'", "its dtype is '|O', expected one of float16")
    assert not marker.exists()
    np.load(io.BytesIO(npy(trap, allow_pickle=True)), allow_pickle=True)
    assert marker.exists()


@pytest.mark.parametrize(
    "array, named",
    [
        (np.zeros(3, "complex64"), "'<c8'"),
        (np.array(["a", "bc"]), "'<U2'"),
        (np.array([b"a"]), "'|S1'"),
        (np.array([True]), "'|b1'"),
        (np.zeros(2, ">f4"), "'>f4'"),
        (np.zeros(2, "V3"), "'|V3'"),
        (np.zeros(2, "M8[s]"), "'<M8[s]'"),
        (np.zeros(2, [("a", "f4"), ("b", "i2")]), "structured"),
    ],
)
def test_other_dtypes(tmp_path, array, named):
    path = craft(tmp_path / "x.npz", ("good.npy", npy(np.zeros(2))))
    assert_same(load(path), {"good": np.zeros(2)})
    craft(path, ("bad.npy", npy(array)))
    refused(
        path, "'bad.npy'", f"dtype is {named}" if named[0] == "'" else named
    )
    with pytest.raises(ValueError, match="'bad' is .*expected one of"):
        write_npz(tmp_path / "y.npz", [("bad", array)])
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize(
    "old, new",
    [
        (b"(3, 4)", b"(3, 5)"),
        (b"(3, 4)", b"(3, )"),
        (b"'<f8'", b"'<f4'"),
    ],
)
def test_a_header_that_disagrees_with_the_size(tmp_path, old, new):
    data = npy(np.zeros((3, 4)))
    # The length is unchanged, and the checksum is valid.
    bad = data.replace(old, new.ljust(len(old)))
    assert bad != data and len(bad) == len(data)
    path = craft(tmp_path / "x.npz", ("a.npy", bad))
    refused(path, "'a.npy'", "with its header, received")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1.0,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1 1), }",
        b"{'descr': '<f8', 'fortran_order': 0, 'shape': (1,), }",
        b"{'descr': '<f8', 'shape': (1,), }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), ",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (%s,)}"
        % (b"9" * 5000),
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (%s)}"
        % (b"1," * 65),
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (0,%s)}"
        % (b"9" * 40),
        b"(" * 9000,
        b"",
        b" " * 10_001,
    ],
)
def test_headers_of_no_array(tmp_path, header):
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    values = b"" if b"(0,9" in header else bytes(8)
    path = craft(tmp_path / "x.npz", ("a.npy", data + values))
    refused(path, "'a.npy'")


@pytest.mark.parametrize(
    "name, word",
    [
        ("a", "ends in .npy"),
        ("a.txt", "ends in .npy"),
        (".npy", "ends in .npy"),
        ("../a.npy", "leads out"),
        ("b/../../a.npy", "leads out"),
        ("..\\a.npy", "leads out"),
        ("b/...npy", "leads out"),
        ("/a.npy", "leads out"),
    ],
)
def test_names_of_no_key(tmp_path, name, word):
    path = craft(tmp_path / "x.npz", (name, npy(np.zeros(1))))
    refused(path, repr(name), word)
    if name.endswith(".npy"):
        with pytest.raises(ValueError, match="cannot be a key"):
            write_npz(tmp_path / "y.npz", [(name[:-4], np.zeros(1))])
        assert os.listdir(tmp_path) == ["x.npz"]


def test_a_member_that_is_no_npy(tmp_path):
    path = craft(tmp_path / "x.npz", ("a.npy", b"Not an array."))
    refused(path, "'a.npy'", "magic string")


def test_two_members_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = craft(
            tmp_path / "x.npz",
            ("a.npy", npy(np.zeros(1))),
            ("a.npy", npy(np.ones(1))),
        )
    refused(path, "'a.npy'", "two members have this name")


def test_an_encrypted_member(tmp_path):
    path = craft(tmp_path / "x.npz", ("a.npy", npy(np.zeros(1))))
    patch(path, CENTRAL, 8, "<H", 1)
    patch(path, LOCAL, 6, "<H", 1)
    refused(path, "'a.npy'", "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99])
def test_another_compression(tmp_path, method):
    path = craft(tmp_path / "x.npz", ("a.npy", npy(np.zeros(1))))
    patch(path, CENTRAL, 10, "<H", method)
    refused(path, "'a.npy'", f"compression {method}, expected stored")


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
)
def test_a_member_that_claims_a_gigabyte(tmp_path, compression):
    claimed = npy(np.broadcast_to(np.float32(0), (1,))).replace(
        b"(1,), }" + b" " * 8, b"(250000000,), }"
    )
    path = craft(
        tmp_path / "x.npz", ("a.npy", claimed), compression=compression
    )
    size = 128 + 10**9
    for claims in ({24: size}, {20: size, 24: size}):
        for offset, value in claims.items():
            patch(path, CENTRAL, offset, "<L", value)
        tracemalloc.start()
        refused(path, "'a.npy'", f"it claims {size} bytes")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MB


@pytest.mark.parametrize("claim", [128, 135, 137, 200])
def test_a_deflated_member_that_claims_another_size(tmp_path, claim):
    path = craft(
        tmp_path / "x.npz",
        ("a.npy", npy(np.zeros(1))),
        compression=zipfile.ZIP_DEFLATED,
    )
    patch(path, CENTRAL, 24, "<L", claim)
    refused(path, "'a.npy'")


def test_a_deflated_member_that_ends_early(tmp_path):
    path = tmp_path / "x.npz"
    data = npy(np.zeros(100))
    craft(path, ("a.npy", data[:-8]), compression=zipfile.ZIP_DEFLATED)
    patch(path, CENTRAL, 24, "<L", len(data))
    refused(path, "'a.npy'", "expected 800 bytes, received 792")


def test_zeros_deflate_to_the_limit(tmp_path):
    zeros = np.zeros(4 * MB, "uint8")
    np.savez_compressed(tmp_path / "x.npz", a=zeros)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        (member,) = archive.infolist()
    assert member.file_size > 1000 * member.compress_size
    assert_same(load(tmp_path / "x.npz"), {"a": zeros})


# Killed writers.

KILLED = """
import os, sys
import numpy as np
from keras_paligemma.checkpoints.storage.npz import write_npz

path, piece_size, renames = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
replace = os.replace

def count_down(*args):
    global renames
    if not renames:
        os._exit(9)
    renames -= 1
    replace(*args)

def arrays():
    yield "new", np.arange(500)
    if renames < 0:
        os._exit(9)

os.replace = count_down
write_npz(path, arrays(), piece_size or None)
"""


def killed(path, piece_size, renames=-1):
    """Write in a process that dies in the iterator or after some renames."""
    command = [sys.executable, "-c", KILLED, path, piece_size, renames]
    run = subprocess.run([str(word) for word in command], cwd=ROOT)
    assert run.returncode == 9


@pytest.mark.parametrize("piece_size", [0, 1000])
def test_a_killed_writer_leaves_no_target(tmp_path, piece_size):
    path = tmp_path / "x.npz"
    killed(path, piece_size)
    drafts = os.listdir(tmp_path)
    assert drafts and all(".draft-" in name for name in drafts)
    refused(path, "does not exist")
    write_npz(path, [("old", np.arange(600))], piece_size or None)
    # The next writer has deleted the drafts.
    assert not [name for name in os.listdir(tmp_path) if ".draft-" in name]
    killed(path, piece_size)
    assert_same(load(path), {"old": np.arange(600)})


def test_a_writer_killed_before_the_rename(tmp_path):
    path = tmp_path / "x.npz"
    write_npz(path, [("old", np.arange(600))])
    killed(path, 0, renames=0)
    assert_same(load(path), {"old": np.arange(600)})


@pytest.mark.parametrize("renames", [0, 1, 4])
def test_a_writer_killed_between_pieces(tmp_path, renames):
    path = tmp_path / "x.npz"
    # As many pieces as the new file: a mixture would have matching names.
    write_npz(path, [("old", np.arange(500, 1000))], 1000)
    assert len(find_pieces(path)) == 5
    killed(path, 1000, renames)
    if renames:
        refused(path, "is not whole", f"received {renames}; missing")
    else:
        refused(path, "does not exist")


@pytest.mark.parametrize("piece_size", [None, 100])
def test_a_failing_iterator_leaves_nothing(tmp_path, piece_size):
    def arrays():
        yield "a", np.arange(500)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "x.npz", arrays(), piece_size)
    assert os.listdir(tmp_path) == []


def test_a_key_that_comes_twice(tmp_path):
    with pytest.raises(ValueError, match="'a' came twice"):
        write_npz(tmp_path / "x.npz", [("a", np.ones(1)), ("a", np.ones(1))])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", [None, 1000, 300])
@pytest.mark.parametrize("after", [None, 1000])
def test_a_target_is_replaced(tmp_path, before, after):
    path = tmp_path / "x.npz"
    write_npz(path, [("old", np.arange(600))], before)
    beside = {"y.npz", "y.npz.part-00000-of-00001"}
    for name in beside:
        (tmp_path / name).touch()
    write_npz(path, [("new", np.arange(500))], after)
    assert_same(load(path), {"new": np.arange(500)})
    wanted = {piece.name for piece in find_pieces(path)} | beside
    assert set(os.listdir(tmp_path)) == wanted


def test_what_cannot_be_a_target(tmp_path):
    for path, size in [("x.zip", None), ("x.npz", 0), ("x.npz", -1)]:
        with pytest.raises(ValueError, match="ends in .npz and a piece_size"):
            write_npz(tmp_path / path, [], size)


# Arbitrary changes of bytes.


def small(path, kind):
    """Write a small archive of unequal members; return bytes and arrays."""
    arrays = {
        "a": np.arange(6, dtype="float32").reshape(2, 3),
        "b": np.asfortranarray(np.arange(20, dtype="int16").reshape(4, 5)),
        "c": np.array([1.5, -2], BFLOAT16),
    }
    if kind == "ours":
        write_npz(path, arrays.items())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in arrays.items():
                method = zipfile.ZIP_DEFLATED if key == "b" else 0
                if array.dtype == BFLOAT16:
                    array = array.view("V2")
                archive.writestr(f"{key}.npy", npy(array), method)
    return path.read_bytes(), arrays


def survives(path, arrays):
    """Return whether a file gives exactly these arrays; else it is refused."""
    try:
        loaded = load(path)
    except ValueError as error:
        assert path.name in str(error)
        return False
    assert_same(loaded, arrays)
    return True


@pytest.mark.parametrize("kind", ["ours", "mixed"])
def test_every_byte_flipped_and_every_length(tmp_path, kind):
    path = tmp_path / "x.npz"
    data, arrays = small(path, kind)
    draw = random.Random(0)
    assert survives(path, arrays)
    held = 0
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= draw.choice([1 << draw.randrange(8), 255, data[at] or 1])
        path.write_bytes(damaged)
        held += survives(path, arrays)
        path.write_bytes(data[:at])
        assert not survives(path, arrays)
    # Dates, versions and the sizes of local headers have no meaning here. They
    # are few: a lax reader would accept more files.
    assert 0 < held < 0.25 * len(data)


def test_members_at_the_same_place(tmp_path):
    """Newer versions of Python only warn of them."""
    path = tmp_path / "x.npz"
    data, _ = small(path, "ours")
    with zipfile.ZipFile(path) as archive:
        first, second, *_ = archive.infolist()
    assert first.header_offset == 0
    offset = second.header_offset.to_bytes(4, "little")
    directory = data.rindex(b"PK\1\2", 0, data.rindex(second.filename.encode()))
    at = data.index(offset, directory)
    path.write_bytes(data[:at] + bytes(4) + data[at + 4 :])
    with pytest.raises(ValueError, match="begin at the same byte"):
        load(path)


@pytest.mark.parametrize("kind", ["ours", "mixed"])
def test_random_damage_to_pieces(tmp_path, kind):
    path = tmp_path / "x.npz"
    data, arrays = small(path, kind)
    pieces = cut(path, 3)
    contents = [piece.read_bytes() for piece in pieces]
    draw = random.Random(1)
    outcomes = []
    for _ in range(250):
        damaged = [bytearray(content) for content in contents]
        one, two = draw.choices(range(3), k=2)
        at = draw.randrange(len(damaged[one]))
        match draw.randrange(5):
            case 0:
                damaged[one], damaged[two] = damaged[two], damaged[one]
            case 1:
                del damaged[one][at:]
            case 2:
                damaged[one] += damaged[two][:at]
            case 3:
                del damaged[one][at : at + draw.randrange(1, 9)]
            case 4:
                for _ in range(draw.randrange(1, 4)):
                    at = draw.randrange(len(damaged[one]))
                    damaged[one][at] = draw.randrange(256)
        for piece, bytes_ in zip(pieces, damaged, strict=True):
            piece.write_bytes(bytes_)
        unchanged = [bytes(content) for content in damaged] == contents
        outcomes.append(survives(path, arrays))
        assert outcomes[-1] or not unchanged
    assert 0 < sum(outcomes) < 125
