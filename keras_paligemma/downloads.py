"""Files of a model from a hub or a bucket, into a cache on this machine."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from keras_paligemma import checksums
from keras_paligemma.config import JSON_LIMIT

# What a model's folder may hold, whatever its format; hubs keep more.
SMALL = ("*.json", "*.model", "*.spm")
PATTERNS = (*SMALL, "*.safetensors", "*.npz*", "*.h5")
# Kaggle's client lists nothing. What KerasHub puts beside weights, of which
# the first is always there.
KERAS_HUB_SMALL = (
    "config.json",
    "preprocessor.json",
    "tokenizer.json",
    "assets/tokenizer/vocabulary.spm",
)
CHUNK = 1 << 24
# Bytes that are read ahead of a header.
BLOCK = 1 << 20


def download(handle: str, weights: bool = True) -> Path:
    """Fetch a model's files; what is there already is not fetched again.

    The hubs' own clients do their part: progress, resuming, the check of sizes
    and hashes, logins and the place of the cache. Files of a bucket go to
    `$KERAS_PALIGEMMA_CACHE`, `~/.cache/keras_paligemma` unless set.

    Args:
        handle: `hf://owner/model`, with `@revision` or `/file` after it if
            need be; `kaggle://owner/model/framework/variation/version`; or
            `gs://bucket/path` of a file, of the stem of its pieces, or of a
            folder.
        weights: Whether those are wanted, or only the small files beside
            them: configurations and tokenizer.

    Returns:
        The folder, or the file, where the handle names one.

    Raises:
        ImportError, OSError, ValueError: no client of the hub; it did not give
            the files; no such hub.
    """
    return _ask(handle, _fetch, weights)


def sizes(handle: str) -> dict[str, int]:
    """Tell which files `download` would fetch, and fetch none.

    Args:
        handle: As `download` takes it.

    Returns:
        Bytes by the name on the hub; empty of Kaggle's, which lists nothing.
    """
    return _ask(handle, _sizes)


def headers(handle: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of a handle's safetensors, and none of the values.

    Args:
        handle: As `download` takes it.

    Returns:
        Dtype, as the format names it, and shape by key; empty of Kaggle's,
        which gives no parts of files, and where there are none.
    """
    return _ask(handle, _headers)


def _ask(handle, function, *args) -> Any:
    """Do one thing on a hub; its client's errors say what to mend."""
    hub, _, path = handle.partition("://")
    if hub not in _CLIENTS:
        raise ValueError(
            "A handle starts with its hub. Expected: 'hf://owner/model', "
            "'kaggle://owner/model/framework/variation' or "
            f"'gs://bucket/path'. Received: {handle!r}."
        )
    client, _ = _CLIENTS[hub]
    try:
        return function(hub, path, *args)
    except ImportError as error:
        raise ImportError(f"{handle} needs: pip install '{client}'") from error
    except Exception as error:  # Every client refuses with its own classes.
        raise OSError(
            f"{page(handle)}\ncould not be downloaded: {error}\nCheck the "
            "name, the connection, and that you accepted the licence on that "
            "page with the account that the hub's client is logged in with "
            "(`hf auth login`, `kagglehub.login()`, `gcloud auth login`)."
        ) from error


def page(handle: str) -> str:
    """Say where to accept the licence of a handle's model."""
    hub, _, path = handle.partition("://")
    parts = path.split("/")
    sites = {
        "hf": f"https://huggingface.co/{'/'.join(parts[:2])}",
        "kaggle": f"https://www.kaggle.com/models/{'/'.join(parts[:2])}",
        "gs": f"https://console.cloud.google.com/storage/browser/{path}",
    }
    return f"- {handle} (licence: {sites[hub].partition('@')[0]})"


def _fetch(hub, path, weights):
    return _CLIENTS[hub][1](path, weights)


def _filesystem(hub):
    """Return what reads a hub without a download."""
    import fsspec

    return fsspec.filesystem(hub)


def _sizes(hub, path):
    if hub == "kaggle":
        return {}
    filesystem = _filesystem(hub)
    found = _listed(filesystem, path)
    return {name: filesystem.info(name)["size"] for name in found}


def _headers(hub, path):
    if hub == "kaggle":
        return {}
    filesystem = _filesystem(hub)
    names = fnmatch.filter(_listed(filesystem, path), "*.safetensors")
    whole = [name for name in names if name.endswith("/model.safetensors")]
    found = {}
    for name in whole or names:
        with filesystem.open(name, "rb", block_size=BLOCK) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > JSON_LIMIT:
                raise ValueError(f"{name} claims a header of {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found |= {
            key: (one["dtype"], tuple(one["shape"]))
            for key, one in header.items()
        }
    return found


def _hugging_face(path, weights):
    """Fetch by the hub's client, whose cache other libraries share."""
    from huggingface_hub import snapshot_download

    owner, model, *file = path.split("/")
    model, _, revision = model.partition("@")
    file = "/".join(file)
    patterns: list[str] = list(PATTERNS if weights else SMALL)
    if file and weights:
        patterns = [f"{file}*"]
    folder = snapshot_download(
        f"{owner}/{model}",
        revision=revision or None,
        allow_patterns=patterns,
    )
    return Path(folder) / file


def _kaggle(path, weights):
    from kagglehub import model_download

    if weights:
        return Path(model_download(path))
    first, *others = KERAS_HUB_SMALL
    folder = Path(model_download(path, path=first)).parent
    for name in others:
        # A backbone alone has none of them.
        with contextlib.suppress(Exception):
            model_download(path, path=name)
    return folder


def _bucket(path, weights):
    return fetch_files(_filesystem("gs"), path, cache() / "gs", weights)


def cache() -> Path:
    """Return the folder of what was downloaded and has no cache of its own."""
    default = Path.home() / ".cache" / "keras_paligemma"
    return Path(os.environ.get("KERAS_PALIGEMMA_CACHE", default))


def fetch_files(filesystem, path, folder, weights=True):
    """Copy a file, its pieces or a folder; go on where a copy was cut off.

    Args:
        filesystem: `fsspec` filesystem.
        path: str, in it.
        folder: `pathlib.Path`, where a copy of the tree is made.
        weights: bool, whether more than the small files is wanted.

    Returns:
        `pathlib.Path` of the copy.

    Raises:
        FileNotFoundError, OSError: nothing there; a copy whose size or hash
            is not the original's (it is removed).
    """
    path = path.rstrip("/")
    found = _listed(filesystem, path)
    if not weights:
        found = [
            one
            for one in found
            if any(fnmatch.fnmatch(one, each) for each in SMALL)
        ]
        if not found:
            raise FileNotFoundError(f"no configuration is at {path}")
    for one in found:
        target = folder / filesystem._strip_protocol(one).lstrip("/")
        if folder.resolve() not in target.resolve().parents:
            raise OSError(f"the path {one!r} leaves the folder {folder}")
        _fetch_file(filesystem, one, target)
    return folder / filesystem._strip_protocol(path).lstrip("/")


def _listed(filesystem, path):
    """List a file, its pieces, or those of a folder that models are made of."""
    path = path.rstrip("/")
    found = filesystem.find(path) or sorted(filesystem.glob(path + ".part*"))
    if not found:
        raise FileNotFoundError(f"nothing is at {path}")
    known = [
        one
        for one in found
        if any(fnmatch.fnmatch(one, each) for each in PATTERNS)
    ]
    return known or found


def _fetch_file(filesystem, path, target):
    info = filesystem.info(path)
    if target.exists() and target.stat().st_size == info["size"]:
        return
    from tqdm import tqdm

    target.parent.mkdir(parents=True, exist_ok=True)
    # The size is in the draft's name, so that a file that changed since is
    # not continued with the bytes of another.
    draft = target.with_name(f"{target.name}.{info['size']}.incomplete")
    with (
        filesystem.open(path, "rb") as source,
        open(draft, "ab") as copy,
        tqdm(
            desc=target.name,
            total=info["size"],
            initial=copy.tell(),
            unit="B",
            unit_scale=True,
        ) as progress,
    ):
        source.seek(copy.tell())
        while chunk := source.read(CHUNK):
            copy.write(chunk)
            progress.update(len(chunk))
    problem = _difference(draft, info)
    if problem:
        draft.unlink()
        raise OSError(f"{path} arrived damaged and was removed: {problem}")
    os.replace(draft, target)


def _difference(draft, info):
    """Compare a copy with the size and the hash that the bucket knows."""
    size = draft.stat().st_size
    if size != info["size"]:
        return f"expected {info['size']} bytes, received {size}"
    if size in checksums.KNOWN:
        try:
            checksums.read_checked(draft)
        except ValueError as error:
            return str(error)
    if wanted := info.get("md5Hash"):
        with open(draft, "rb") as file:
            found = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(found).decode() != wanted:
            return f"expected MD5 {wanted}, received another"
    return None


# What each needs, and what downloads with it.
_CLIENTS = {
    "hf": ("keras_paligemma[hf]", _hugging_face),
    "kaggle": ("kagglehub", _kaggle),
    "gs": ("keras_paligemma[gs]", _bucket),
}
