"""The index of a checkpoint that is stored in several files."""

from pathlib import Path

from keras_paligemma.checked import shown
from keras_paligemma.config import read_json

# Of every file system in use.
LONGEST_NAME = 255


def shards(index):
    """List the files that an index names.

    Args:
        index: `pathlib.Path` of a JSON file with a `weight_map`, as
            transformers and Keras write it.

    Returns:
        Sorted list of `pathlib.Path`, which lie beside the index if they are
        there.

    Raises:
        ValueError: no such index, or a name that leads elsewhere.
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
        # Keras lists the files of a layer, transformers has one a tensor.
        for file in name if isinstance(name, list) else [name]:
            _check_name(file, index)
            listed.add(file)
    return [index.with_name(name) for name in sorted(listed)]


def _check_name(name, index):
    # A file from elsewhere must not make a loader open what lies outside the
    # folder. Symlinks inside it are fine: hubs' caches are made of them.
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
