"""Download a model's files from a hub or a bucket into a local cache."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from keras_paligemma import atomic
from keras_paligemma import checksums
from keras_paligemma.config import JSON_LIMIT

# The files of a model in any format; hubs hold other files too.
SMALL = ("*.json", "*.model", "*.spm")
LARGE = ("*.safetensors", "*.npz*", "*.h5")
PATTERNS = (*SMALL, *LARGE)
# Kaggle's client cannot list files. KerasHub writes these files beside weights;
# the first always exists.
KERAS_HUB_SMALL = (
    "config.json",
    "preprocessor.json",
    "tokenizer.json",
    "assets/tokenizer/vocabulary.spm",
)
CHUNK = 1 << 24
# Bytes of a read when headers are fetched.
BLOCK = 1 << 20
# Owner and model, revision, file. Only revisions of pull requests and of
# conversions contain slashes.
HUGGING_FACE = re.compile(
    r"([^/@]+/[^/@]+)(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?(?:/([^@]*))?"
)


def download(handle: str, weights: bool = True) -> Path:
    """Download a model's files, except those already in the cache.

    The hubs' own clients handle progress, resuming, verification of sizes and
    hashes, logins and the location of the cache. Files of a bucket go to
    `$KERAS_PALIGEMMA_CACHE`, by default `~/.cache/keras_paligemma`.

    Args:
        handle: str: `hf://owner/model`, optionally followed by `@revision`,
            by `/file` or by both;
            `kaggle://owner/model/framework/variation/version`; or
            `gs://bucket/path` of a file, of the stem of its pieces, or of a
            folder.
        weights: bool; `False` downloads only the small files beside the
            weights: configurations and tokenizer.

    Returns:
        `pathlib.Path` of the folder, or of the file if the handle names one.

    Raises:
        ImportError: the hub's client is not installed.
        OSError: the download failed.
        ValueError: unknown hub, or no model on it.
    """
    return _ask(handle, _fetch, weights)


def sizes(handle: str) -> dict[str, int]:
    """Return the files that `download` would fetch, without a download.

    Args:
        handle: str, as in `download`.

    Returns:
        dict of the name on the hub to the size in bytes; empty for Kaggle,
        whose client cannot list files.
    """
    return _ask(handle, _sizes)


def headers(handle: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the headers of a handle's safetensors files, not their values.

    Args:
        handle: str, as in `download`.

    Returns:
        dict of key to dtype, as the format names it, and shape; empty without
        such files, and for Kaggle, whose client cannot read parts of files.
    """
    return _ask(handle, _headers)


def _ask(handle, function, *args) -> Any:
    """Call a function for a hub, and explain its client's errors."""
    hub, _, path = handle.partition("://")
    if hub not in _CLIENTS:
        raise ValueError(
            "A handle starts with its hub. Expected: 'hf://owner/model', "
            "'kaggle://owner/model/framework/variation' or "
            f"'gs://bucket/path'. Received: {handle!r}."
        )
    if hub == "hf" and not HUGGING_FACE.fullmatch(path):
        raise ValueError(
            "A model of this hub has an owner and a name. Expected: "
            "'hf://owner/model', 'hf://owner/model@revision' or "
            f"'hf://owner/model@revision/file'. Received: {handle!r}."
        )
    client, _ = _CLIENTS[hub]
    try:
        return function(hub, path, *args)
    except ImportError as error:
        raise ImportError(f"{handle} needs: pip install '{client}'") from error
    except Exception as error:  # Each client has its own error classes.
        raise OSError(
            f"{page(handle)}\ncould not be downloaded: {error}\nCheck the "
            "name, the connection, and that you accepted the licence on that "
            "page with the account that the hub's client is logged in with "
            "(`hf auth login`, `kagglehub.login()`, `gcloud auth login`)."
        ) from error


def page(handle: str) -> str:
    """Return a line with the page where a model's licence is accepted."""
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
    """Return the `fsspec` filesystem of a hub."""
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
            key: (entry["dtype"], tuple(entry["shape"]))
            for key, entry in header.items()
        }
    return found


def _hugging_face(path, weights):
    """Download with the hub's client, whose cache other libraries share."""
    from huggingface_hub import snapshot_download

    # `_ask` has matched it.
    model, revision, file = HUGGING_FACE.fullmatch(path).groups("")  # pyright: ignore[reportOptionalMemberAccess]
    file = file.rstrip("/")
    small, wanted = [*SMALL], [*LARGE]
    if file and weights:
        # A file, its pieces, or a folder: no files of a longer name.
        small = [f"{file}/{name}" for name in SMALL]
        wanted = [file, f"{file}.part*", *(f"{file}/{name}" for name in LARGE)]
    patterns = [*small, *wanted] if weights else small
    folder = Path(
        snapshot_download(
            model, revision=revision or None, allow_patterns=patterns
        )
    )
    # Offline, the client returns what is there.
    there = (path for name in wanted for path in folder.rglob(name))
    if weights and not any(path.is_file() for path in there):
        raise FileNotFoundError(
            f"{folder} has no {' or '.join(wanted)}: the model has none, or "
            "its download was not complete and must go on, online"
        )
    return folder / file


def _kaggle(path, weights):
    from kagglehub import model_download

    if weights:
        return Path(model_download(path))
    first, *others = KERAS_HUB_SMALL
    folder = Path(model_download(path, path=first)).parent
    for name in others:
        # The preset of a backbone does not have these files.
        with contextlib.suppress(Exception):
            model_download(path, path=name)
    return folder


def _bucket(path, weights):
    return fetch_files(_filesystem("gs"), path, cache() / "gs", weights)


def cache() -> Path:
    """Return the cache folder for downloads without a client's own cache."""
    default = "~/.cache/keras_paligemma"
    given = os.environ.get("KERAS_PALIGEMMA_CACHE") or default
    return atomic.local(given)


def fetch_files(filesystem, path, folder, weights=True):
    """Copy a file, its pieces or a folder, resuming an interrupted copy.

    Files that were overwritten since are copied again. What tells them apart,
    if the filesystem has it, is in a hidden file beside the copy. Processes
    with the same folder copy in turns, so that they do not write to the same
    file and each is copied once.

    Args:
        filesystem: `fsspec` filesystem.
        path: str, path in the filesystem.
        folder: `pathlib.Path`, root of the copied tree.
        weights: bool; `False` copies the small files only.

    Returns:
        `pathlib.Path` of the copy.

    Raises:
        FileNotFoundError: no such path.
        OSError: the copy's size or hash differs (the copy is removed).
    """
    path = path.rstrip("/")
    found = _listed(filesystem, path)
    if not weights:
        found = _matching(found, SMALL)
        if not found:
            raise FileNotFoundError(f"no configuration is at {path}")
    missing = []
    for file in found:
        target = folder / filesystem._strip_protocol(file).lstrip("/")
        if folder.resolve() not in target.resolve().parents:
            raise OSError(f"the path {file!r} leaves the folder {folder}")
        info = filesystem.info(file)
        if not _is_current(target, info):
            missing.append((file, target, info))
    if missing:
        from filelock import FileLock

        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for file, target, info in missing:
                _fetch_file(filesystem, file, target, info)
    return folder / filesystem._strip_protocol(path).lstrip("/")


def _listed(filesystem, path):
    """List a file, its pieces, or the model files of a folder."""
    path = path.rstrip("/")
    found = filesystem.find(path) or sorted(filesystem.glob(path + ".part*"))
    if not found:
        raise FileNotFoundError(f"nothing is at {path}")
    return _matching(found, PATTERNS) or found


def _matching(files, patterns):
    """Return the files that match any of some glob patterns."""
    return [
        file
        for file in files
        if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    ]


def _is_current(target, info):
    """Return whether a copy is complete and of the present version."""
    version = _version(info)
    return (
        target.exists()
        and target.stat().st_size == info["size"]
        and (not version or _text(_note(target)) == version)
    )


def _fetch_file(filesystem, path, target, info):
    # Another process may have copied it meanwhile.
    if _is_current(target, info):
        return
    from tqdm import tqdm

    target.parent.mkdir(parents=True, exist_ok=True)
    # Size and version are in the draft's name, so that a copy is not resumed
    # from another version of the file. It is hidden, or it would be a piece.
    version = _version(info)
    known = f"{info['size']}.{version}".rstrip(".")
    draft = target.with_name(f".{target.name}.{known}.incomplete")
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
    if version:
        _note(target).write_text(version, encoding="utf-8")


def _note(target):
    """Return the path of the file that holds the version of a copy."""
    return target.with_name(f".{target.name}.version")


def _version(info):
    """Return a str that changes when a file is overwritten; "" if unknown."""
    for name in ("md5Hash", "etag", "generation"):
        if info.get(name):
            return hashlib.sha256(str(info[name]).encode()).hexdigest()[:16]
    return ""


def _text(path):
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _difference(draft, info):
    """Return how a copy differs from the bucket's size and hash, or `None`."""
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


# The package to install for each hub, and its download function.
_CLIENTS = {
    "hf": ("keras_paligemma[hf]", _hugging_face),
    "kaggle": ("kagglehub", _kaggle),
    "gs": ("keras_paligemma[gs]", _bucket),
}
