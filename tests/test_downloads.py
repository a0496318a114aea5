"""Downloads from stand-ins for hubs and buckets."""

import base64
import fnmatch
import functools
import hashlib
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from keras_paligemma import checksums
from keras_paligemma import downloads
from keras_paligemma.checkpoints.storage.pieces import find_pieces


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
    draft = target.with_name(f".{target.name}.500.incomplete")
    # Existing bytes are kept, so the X ends up in the file.
    draft.write_bytes(b"X" * 7)
    downloads.fetch_files(bucket, "bucket/model/a.npz.part-0", tmp_path)
    assert target.read_bytes() == b"X" * 7 + (b"first" * 100)[7:]
    assert not draft.exists()


def test_what_was_cut_of_another_version_is_no_piece(
    bucket, tmp_path, monkeypatch
):
    fetch = functools.partial(
        downloads.fetch_files, bucket, "bucket/model/a.npz", tmp_path
    )
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "os", None)  # Cut before it is renamed.
        with pytest.raises(AttributeError):
            fetch()
    bucket.pipe("/bucket/model/a.npz.part-0", b"second version")
    names = [path.name for path in find_pieces(fetch())]
    assert names == ["a.npz.part-0", "a.npz.part-1"]


def test_copies_at_the_same_time(bucket, tmp_path, monkeypatch):
    """Processes that appended to the same draft removed it as damaged."""
    opened, read = [], bucket.open

    def slow(path, mode):
        opened.append(path)
        time.sleep(0.2)
        return read(path, mode)

    monkeypatch.setattr(bucket, "open", slow)
    path = "bucket/model/a.npz.part-0"
    with ThreadPoolExecutor(2) as pool:
        fetch = functools.partial(downloads.fetch_files, bucket, path)
        first, second = pool.map(fetch, [tmp_path] * 2)
    assert first == second
    assert first.read_bytes() == b"first" * 100
    assert len(opened) == 1


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


def test_what_was_overwritten_is_fetched_again(bucket, tmp_path, monkeypatch):
    """The new object has the size of the old one."""
    info = bucket.info
    path = "bucket/model/tokenizer.model"

    def with_hash(path):
        digest = hashlib.md5(bucket.cat_file(path)).digest()
        return info(path) | {"md5Hash": base64.b64encode(digest).decode()}

    monkeypatch.setattr(bucket, "info", with_hash)
    downloads.fetch_files(bucket, path, tmp_path)
    bucket.pipe(f"/{path}", b"others")
    found = downloads.fetch_files(bucket, path, tmp_path)
    assert found.read_bytes() == b"others"
    monkeypatch.setattr(bucket, "open", None)
    assert downloads.fetch_files(bucket, path, tmp_path) == found


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("~/kept", "kept"),
        ("", ".cache/keras_paligemma"),
        (None, ".cache/keras_paligemma"),
    ],
)
def test_the_cache_is_a_folder_of_the_user(
    given, wanted, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_PALIGEMMA_CACHE", raising=False)
    if given is not None:
        monkeypatch.setenv("KERAS_PALIGEMMA_CACHE", given)
    assert downloads.cache() == tmp_path / wanted


def test_a_cache_that_nobody_has(monkeypatch):
    monkeypatch.setenv("KERAS_PALIGEMMA_CACHE", "~nobody_of_this_name/a")
    with pytest.raises(ValueError, match="Expected: a path that starts with"):
        downloads.cache()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A client that is offline; returns what it was asked for."""
    (tmp_path / "config.json").touch()
    (tmp_path / "pt_224.npz").touch()
    asked = []

    def snapshot_download(model, revision, allow_patterns):
        asked.append((model, revision, allow_patterns))
        return str(tmp_path)

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return asked


def fetched(names, patterns):
    """Return the names that the hub's client would fetch."""
    return {
        name
        for name in names
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


@pytest.mark.parametrize(
    ("handle", "revision", "file"),
    [
        ("hf://me/m", None, ""),
        ("hf://me/m/", None, ""),
        ("hf://me/m@main", "main", ""),
        ("hf://me/m@refs/pr/1", "refs/pr/1", ""),
        ("hf://me/m/pt_224.npz", None, "pt_224.npz"),
        ("hf://me/m@main/pt_224.npz", "main", "pt_224.npz"),
        ("hf://me/m@refs/pr/1/pt_224.npz", "refs/pr/1", "pt_224.npz"),
    ],
)
def test_revision_and_file_of_a_handle(hub, tmp_path, handle, revision, file):
    assert downloads.download(handle) == tmp_path / file
    ((model, found, patterns),) = hub
    assert (model, found) == ("me/m", revision)
    assert fetched(["config.json", "pt_224.npz", "optimizer.pt"], patterns) == (
        {file} if file else {"config.json", "pt_224.npz"}
    )


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_of_a_model_is_fetched_alone(
    hub, bucket, tmp_path, monkeypatch, slash
):
    """Checkpoints of a training lie beside each other, with optimizers."""
    wanted = {"run-1/config.json", "run-1/model.safetensors"}
    others = {"run-1/optimizer.pt", "run-10/model.safetensors", "config.json"}
    for name in wanted | others:
        bucket.pipe(f"/me/m/{name}", b"")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(downloads, "_filesystem", {"hf": bucket}.get)
    handle = f"hf://me/m/run-1{slash}"
    assert downloads.download(handle) == tmp_path / "run-1"
    assert fetched(wanted | others, hub[0][2]) == wanted
    assert set(downloads.sizes(handle)) == {f"/me/m/{name}" for name in wanted}
    (tmp_path / "run-1/model.safetensors").unlink()
    with pytest.raises(OSError, match="download was not complete"):
        downloads.download(handle)


@pytest.mark.parametrize("file", ["a.npz", "a.npz.part-0"])
def test_the_pieces_of_a_file_of_a_model(hub, tmp_path, file):
    (tmp_path / file).touch()
    downloads.download("hf://me/m/a.npz")
    assert fetched([file, "a.npz.md"], hub[0][2]) == {file}


@pytest.mark.parametrize(
    "handle", ["hf://", "hf://me", "hf://me/m/pt_224.npz@main", "hf://me/m@"]
)
def test_a_handle_that_names_no_model(handle):
    with pytest.raises(ValueError, match="Expected: 'hf://owner/model'"):
        downloads.download(handle)


def test_an_incomplete_download_is_told(hub, tmp_path):
    (tmp_path / "pt_224.npz").unlink()
    downloads.download("hf://me/m", weights=False)
    for handle in ("hf://me/m", "hf://me/m/pt_224.npz"):
        with pytest.raises(OSError, match="download was not complete"):
            downloads.download(handle)


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
