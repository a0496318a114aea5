"""The values of a SavedModel, written a part at a time."""

from pathlib import Path

import tensorflow as tf

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
PART = 50_000_000


def write(prefix, values, part=PART):
    """Put values in place of those that a SavedModel was saved with.

    `tf.saved_model.save` has all of them in memory at once. Here it saves
    variables of no size, and each part of their values is a shard.

    Args:
        prefix: path of the SavedModel's variables, without the end.
        values: iterable of pairs of key and array or tensor, each key of the
            checkpoint that is there.
        part: int, bytes that are held in memory before they are written.
    """
    saved = tf.train.load_checkpoint(prefix)
    graph = saved.get_tensor(OBJECT_GRAPH)
    expected = {*saved.get_variable_to_shape_map()} - {OBJECT_GRAPH}
    for path in Path(prefix).parent.iterdir():
        path.unlink()
    shards, held, size = [], {OBJECT_GRAPH: tf.constant(graph)}, 0

    def flush():
        nonlocal size
        shards.append(f"{prefix}-{len(shards)}")
        tf.raw_ops.SaveV2(
            prefix=shards[-1],
            tensor_names=[*held],
            shape_and_slices=[""] * len(held),
            tensors=[*held.values()],
        )
        held.clear()
        size = 0

    for key, value in values:
        expected.remove(key)
        held[key] = value = tf.convert_to_tensor(value)
        size += value.dtype.size * value.shape.num_elements()
        del value
        if size >= part:
            # Else it would be in memory while the next one is read.
            flush()
    if held:
        flush()
    if expected:
        raise ValueError(f"Nothing was given for {sorted(expected)}.")
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=shards,
        destination_prefix=str(prefix),
        delete_old_dirs=False,
    )
