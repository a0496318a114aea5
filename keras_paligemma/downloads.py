"""Files of a model from a hub or a bucket, into a cache on this machine."""

import base64
import hashlib
import os
from pathlib import Path

# What a model's folder may hold, whatever its format; hubs keep more.
PATTERNS = ("*.json", "*.model", "*.spm", "*.safetensors", "*.npz*", "*.h5")
CHUNK = 1 << 24


def download(handle: str) -> Path:
    """Fetch a model's files; what is there already is not fetched again.

    The hubs' own clients do their part: progress, resuming, the check of sizes
    and hashes, logins and the place of the cache. Files of a bucket go to
    `$KERAS_PALIGEMMA_CACHE`, `~/.cache/keras_paligemma` unless set.

    Args:
        handle: `hf://owner/model`, with `@revision` or `/file` after it if
            need be; `kaggle://owner/model/framework/variation/version`; or
            `gs://bucket/path` of a file, of the stem of its pieces, or of a
            folder.

    Returns:
        The folder, or the file, where the handle names one.

    Raises:
        ImportError, OSError, ValueError: no client of the hub; it did not give
            the files; no such hub.
    """
    hub, _, path = handle.partition("://")
    if hub not in _CLIENTS:
        raise ValueError(
            "A handle starts with its hub. Expected: 'hf://owner/model', "
            "'kaggle://owner/model/framework/variation' or "
            f"'gs://bucket/path'. Received: {handle!r}."
        )
    fetch, client = _CLIENTS[hub]
    try:
        return fetch(path)
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


def _hugging_face(path):
    from huggingface_hub import snapshot_download

    owner, model, *file = path.split("/")
    model, _, revision = model.partition("@")
    file = "/".join(file)
    folder = snapshot_download(
        f"{owner}/{model}",
        revision=revision or None,
        allow_patterns=[f"{file}*"] if file else list(PATTERNS),
    )
    return Path(folder) / file


def _kaggle(path):
    from kagglehub import model_download

    return Path(model_download(path))


def _bucket(path):
    import fsspec

    return fetch_files(fsspec.filesystem("gs"), path, cache() / "gs")


def cache() -> Path:
    """Give the folder of what was downloaded and has no cache of its own."""
    default = Path.home() / ".cache" / "keras_paligemma"
    return Path(os.environ.get("KERAS_PALIGEMMA_CACHE", default))


def fetch_files(filesystem, path, folder):
    """Copy a file, its pieces or a folder; go on where a copy was cut off.

    Args:
        filesystem: `fsspec` filesystem.
        path: str, in it.
        folder: `pathlib.Path`, where a copy of the tree is made.

    Returns:
        `pathlib.Path` of the copy.

    Raises:
        FileNotFoundError, OSError: nothing there; a copy whose size or hash
            is not the original's (it is removed).
    """
    path = path.rstrip("/")
    found = filesystem.find(path) or sorted(filesystem.glob(path + ".part*"))
    if not found:
        raise FileNotFoundError(f"nothing is at {path}")
    for one in found:
        target = folder / filesystem._strip_protocol(one).lstrip("/")
        if folder.resolve() not in target.resolve().parents:
            raise OSError(f"the path {one!r} leaves the folder {folder}")
        _fetch_file(filesystem, one, target)
    return folder / filesystem._strip_protocol(path).lstrip("/")


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
    if wanted := info.get("md5Hash"):
        with open(draft, "rb") as file:
            found = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(found).decode() != wanted:
            return f"expected MD5 {wanted}, received another"
    return None


_CLIENTS = {
    "hf": (_hugging_face, "keras_paligemma[hf]"),
    "kaggle": (_kaggle, "kagglehub"),
    "gs": (_bucket, "keras_paligemma[gs]"),
}
