"""Write the values of a SavedModel's variables in parts."""

from pathlib import Path

import tensorflow as tf

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
PART = 50_000_000


def write(prefix, values, part=PART):
    """Replace the values of a SavedModel's variables.

    `tf.saved_model.save` holds all values in memory at once. So the model is
    saved with empty variables, and their values are written here as shards.

    Args:
        prefix: str, path of the SavedModel's variables, without extension.
        values: iterable of pairs of key and array or tensor, one for each key
            of the existing checkpoint.
        part: int, bytes held in memory before a shard is written.

    Raises:
        ValueError: a key of the existing checkpoint has no value.
    """
    saved = tf.train.load_checkpoint(prefix)
    graph = saved.get_tensor(OBJECT_GRAPH)
    expected = {*saved.get_variable_to_shape_map()} - {OBJECT_GRAPH}
    for path in Path(prefix).parent.iterdir():
        path.unlink()
    shards, tensors, size = [], {OBJECT_GRAPH: tf.constant(graph)}, 0

    def flush():
        nonlocal size
        shards.append(f"{prefix}-{len(shards)}")
        tf.raw_ops.SaveV2(
            prefix=shards[-1],
            tensor_names=[*tensors],
            shape_and_slices=[""] * len(tensors),
            tensors=[*tensors.values()],
        )
        tensors.clear()
        size = 0

    for key, value in values:
        expected.remove(key)
        tensors[key] = value = tf.convert_to_tensor(value)
        size += value.dtype.size * value.shape.num_elements()
        del value
        if size >= part:
            # Written now, to free memory before the next value is read.
            flush()
    if tensors:
        flush()
    if expected:
        raise ValueError(f"Nothing was given for {sorted(expected)}.")
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=shards,
        destination_prefix=str(prefix),
        delete_old_dirs=False,
    )
