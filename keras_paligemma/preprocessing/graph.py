"""The preprocessor inside of a TensorFlow graph, for `tf.data`."""

import sys


def is_symbolic(x) -> bool:
    """Return whether a dict holds symbolic tensors of a TensorFlow graph.

    TensorFlow is not imported: unless it already is, there is no graph.

    Args:
        x: dict with values of any type.

    Returns:
        bool.

    Example:

    >>> is_symbolic({"prompts": "caption en"})
    False
    """
    tf = sys.modules.get("tensorflow")
    return tf is not None and any(
        tf.is_tensor(value) and tf.is_symbolic_tensor(value)
        for value in x.values()
    )


def call_in_python(preprocessor, x, sample_weight=None, sequence_length=None):
    """Call a preprocessor by `tf.numpy_function`, with static shapes.

    It runs in the training process, one call at a time: such a graph can
    neither be saved nor run in another process.

    Args:
        preprocessor: `PaliGemmaCausalLMPreprocessor`.
        x: dict of symbolic tensors: one example or a batch.
        sample_weight: `None`, or a symbolic tensor of one weight per example.
        sequence_length: int or `None`, as in the preprocessor's `call`.

    Returns:
        `(x, y, sample_weight)` as in `call`, of symbolic tensors.

    Raises:
        ValueError: no prompts, or tensors of unknown rank.

    Source: https://www.tensorflow.org/api_docs/python/tf/numpy_function.
    """
    tf = sys.modules["tensorflow"]
    prompts = x.get("prompts")
    if prompts is None or prompts.shape.rank is None:
        raise ValueError(
            "In a graph the preprocessor needs prompts of a known rank. "
            f"Expected: a string tensor of rank 0 or 1. Received: {prompts}."
        )
    batch = prompts.shape
    inputs = {"x": dict(x)}
    if sample_weight is not None:
        inputs["sample_weight"] = sample_weight
    length = preprocessor.response_length_of(sequence_length)
    text = batch + [preprocessor.prompt_length + length]
    response = batch + [length]
    outputs = {
        "token_ids": tf.TensorSpec(text, "int32"),
        "padding_mask": tf.TensorSpec(text, "bool"),
        "response_mask": tf.TensorSpec(text, "bool"),
    }
    images, converter = x.get("images"), preprocessor.image_converter
    embeddings = x.get("image_embeddings")
    for name, tensor in (("images", images), ("image_embeddings", embeddings)):
        if tensor is not None and tensor.shape.rank is None:
            raise ValueError(
                f"In a graph the preprocessor needs {name} of a known rank. "
                f"Received: {tensor}. Call `tf.io.decode_image` with "
                "expand_animations=False, or `tensor.set_shape`."
            )
    if embeddings is not None:
        outputs["image_embeddings"] = tf.TensorSpec(
            batch + embeddings.shape[-2:], embeddings.dtype
        )
    if images is not None and converter is not None:
        # Encoded files are strings, one per picture. Grey pictures have no
        # axis of colours.
        axes = 0 if images.dtype == tf.string else 3
        last = max(images.shape.rank - axes, batch.rank)
        frames = images.shape[batch.rank : last]
        size = (*converter.image_size, 3)
        outputs["images"] = tf.TensorSpec(batch + frames + size, "float32")
    outputs = (
        outputs,
        tf.TensorSpec(response, "int32"),
        tf.TensorSpec(response, "float32"),
    )

    def call(*arrays):
        arguments = tf.nest.pack_sequence_as(inputs, arrays)
        found = preprocessor.call(**arguments, sequence_length=sequence_length)
        return tf.nest.flatten(found)

    flat = tf.numpy_function(
        call,
        tf.nest.flatten(inputs),
        [spec.dtype for spec in tf.nest.flatten(outputs)],
        stateful=False,
        name="preprocess",
    )
    for tensor, spec in zip(flat, tf.nest.flatten(outputs), strict=True):
        tensor.set_shape(spec.shape)
    return tf.nest.pack_sequence_as(outputs, flat)
