"""The index of a checkpoint that is stored in several files."""

from pathlib import Path

from keras_paligemma.checked import shown
from keras_paligemma.config import read_json

# Maximum length of a file name on common file systems.
LONGEST_NAME = 255


def shards(index):
    """List the files that an index names.

    Args:
        index: `pathlib.Path` of a JSON file with a `weight_map`, as
            transformers and Keras write it.

    Returns:
        sorted list of `pathlib.Path` in the index's folder; they may not
        exist.

    Raises:
        ValueError: an invalid index, or a name outside its folder.
    """
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f"{index} is no index of shards. Expected: JSON with a "
            "`weight_map` of tensor names to file names. Copy it again."
        )
    listed = set()
    for name in names.values():
        # Keras lists the files of a layer; transformers names one per tensor.
        for file in name if isinstance(name, list) else [name]:
            _check_name(file, index)
            listed.add(file)
    return [index.with_name(name) for name in sorted(listed)]


def _check_name(name, index):
    # An untrusted index must not make the loader open files outside the folder.
    # Symlinks inside it are allowed: hubs' caches consist of them.
    if (
        not isinstance(name, str)
        or not name
        or not name.isprintable()
        or name != Path(name).name
        or len(name.encode()) > LONGEST_NAME
    ):
        raise ValueError(
            f"{index} names {shown(name)}. Expected: the name of a file that "
            "lies beside the index, without a folder. Copy it again."
        )
