"""Downloads from stand-ins for hubs and buckets."""

import base64
import hashlib

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from keras_paligemma import checksums
from keras_paligemma import downloads


@pytest.fixture
def bucket():
    filesystem = fsspec.filesystem("memory", skip_instance_cache=True)
    filesystem.store.clear()
    filesystem.pipe(
        {
            "/bucket/model/a.npz.part-0": b"first" * 100,
            "/bucket/model/a.npz.part-1": b"second",
            "/bucket/model/tokenizer.model": b"pieces",
        }
    )
    yield filesystem
    filesystem.store.clear()


def test_a_folder(bucket, tmp_path):
    found = downloads.fetch_files(bucket, "bucket/model", tmp_path)
    assert found == tmp_path / "bucket/model"
    names = {path.name: path.read_bytes() for path in found.iterdir()}
    assert names == {
        "a.npz.part-0": b"first" * 100,
        "a.npz.part-1": b"second",
        "tokenizer.model": b"pieces",
    }


def test_small_files_alone(bucket, tmp_path):
    found = downloads.fetch_files(bucket, "bucket/model", tmp_path, False)
    assert [path.name for path in found.iterdir()] == ["tokenizer.model"]
    with pytest.raises(FileNotFoundError, match="no configuration"):
        downloads.fetch_files(bucket, "bucket/model/a.npz", tmp_path, False)


def test_sizes_are_told_without_a_download(bucket, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(bucket, "open", refuse)
    monkeypatch.setattr(downloads, "_filesystem", {"gs": bucket}.get)
    assert downloads.sizes("gs://bucket/model/a.npz") == {
        "/bucket/model/a.npz.part-0": 500,
        "/bucket/model/a.npz.part-1": 6,
    }
    assert downloads.headers("gs://bucket/model") == {}
    with pytest.raises(OSError, match="nothing is at bucket/other"):
        downloads.sizes("gs://bucket/other")
    assert downloads.sizes("kaggle://me/m/keras/v/1") == {}


def test_headers_are_read_without_the_values(bucket, monkeypatch):
    monkeypatch.setattr(downloads, "_filesystem", {"gs": bucket}.get)
    for number in (1, 2):
        shard = save({f"w{number}": np.zeros((number, 3), "float32")})
        name = f"bucket/model/model-0000{number}-of-00002.safetensors"
        bucket.pipe(f"/{name}", shard)
    found = {"w1": ("F32", (1, 3)), "w2": ("F32", (2, 3))}
    assert downloads.headers("gs://bucket/model") == found
    bucket.pipe(f"/{name}", b"\xff" * 20)
    with pytest.raises(OSError, match="00002.safetensors claims a header of"):
        downloads.headers("gs://bucket/model")


def test_a_known_file_that_is_another(bucket, tmp_path, monkeypatch):
    """The bucket has no hash, but the size and hash are known here."""
    wanted = hashlib.sha256(b"pieces").hexdigest()
    monkeypatch.setattr(checksums, "KNOWN", {6: ("the toy", wanted)})
    path = "bucket/model/tokenizer.model"
    downloads.fetch_files(bucket, path, tmp_path)
    (tmp_path / path).unlink()
    bucket.pipe("/" + path, b"pieceS")
    with pytest.raises(OSError, match="arrived damaged.*bytes of the toy"):
        downloads.fetch_files(bucket, path, tmp_path)
    assert not list((tmp_path / "bucket/model").iterdir())


def test_the_stem_of_pieces(bucket, tmp_path):
    found = downloads.fetch_files(bucket, "bucket/model/a.npz", tmp_path)
    assert found == tmp_path / "bucket/model/a.npz"
    names = sorted(path.name for path in found.parent.iterdir())
    assert names == ["a.npz.part-0", "a.npz.part-1"]


def test_a_cut_download_goes_on(bucket, tmp_path):
    target = tmp_path / "bucket/model/a.npz.part-0"
    target.parent.mkdir(parents=True)
    draft = target.with_name(f"{target.name}.500.incomplete")
    # Existing bytes are kept, so the X ends up in the file.
    draft.write_bytes(b"X" * 7)
    downloads.fetch_files(bucket, "bucket/model/a.npz.part-0", tmp_path)
    assert target.read_bytes() == b"X" * 7 + (b"first" * 100)[7:]
    assert not draft.exists()


def test_what_is_there_is_not_fetched_again(bucket, tmp_path, monkeypatch):
    downloads.fetch_files(bucket, "bucket/model", tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(bucket, "open", refuse)
    downloads.fetch_files(bucket, "bucket/model", tmp_path)


def test_a_wrong_hash_is_removed(bucket, tmp_path, monkeypatch):
    info = bucket.info

    def with_hash(path):
        return info(path) | {"md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg=="}

    monkeypatch.setattr(bucket, "info", with_hash)
    with pytest.raises(OSError, match="arrived damaged and was removed"):
        downloads.fetch_files(bucket, "bucket/model/tokenizer.model", tmp_path)
    assert not list((tmp_path / "bucket/model").iterdir())


def test_the_right_hash(bucket, tmp_path, monkeypatch):
    info = bucket.info
    digest = base64.b64encode(hashlib.md5(b"pieces").digest()).decode()
    monkeypatch.setattr(
        bucket, "info", lambda path: info(path) | {"md5Hash": digest}
    )
    path = downloads.fetch_files(
        bucket, "bucket/model/tokenizer.model", tmp_path
    )
    assert path.read_bytes() == b"pieces"


def test_nothing_there(bucket, tmp_path):
    with pytest.raises(FileNotFoundError, match="bucket/other"):
        downloads.fetch_files(bucket, "bucket/other", tmp_path)


def test_a_path_that_climbs_out(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(bucket, "find", lambda path: ["/bucket/../../x"])
    with pytest.raises(OSError, match="leaves the folder"):
        downloads.fetch_files(bucket, "bucket", tmp_path)


@pytest.mark.parametrize(
    ("handle", "page"),
    [
        ("hf://me/m@main/x.npz", "https://huggingface.co/me/m)"),
        ("kaggle://me/m/keras/v/1", "https://www.kaggle.com/models/me/m)"),
    ],
)
def test_the_page_of_a_licence(handle, page):
    assert page in downloads.page(handle)
