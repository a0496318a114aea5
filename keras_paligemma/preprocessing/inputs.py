"""What users hand in, as NumPy arrays and Python strings."""

import numpy as np


def to_numpy(x) -> np.ndarray:
    """Converts an array, or a tensor of any framework, to NumPy.

    Preprocessing runs in NumPy whatever the backend, so that a JAX or Torch
    training loop runs no TensorFlow.

    Args:
        x: Array, eager tensor, number or nested list of numbers.

    Returns:
        NumPy array.

    Raises:
        ValueError: `x` is a symbolic tensor, as inside `tf.data` maps.

    Example:

    >>> to_numpy([1, 2]).shape
    (2,)
    """
    try:
        return np.asarray(x)
    except NotImplementedError as error:
        # What TensorFlow raises when a symbolic tensor is asked for values.
        raise ValueError(
            "Preprocessing runs in NumPy, not in a TensorFlow graph. "
            "Expected: arrays, strings or eager tensors. Received: a symbolic "
            f"tensor, {x}. Call `fit` on dictionaries of lists or arrays, use "
            "Grain, or map the preprocessor over NumPy batches outside of "
            "`tf.data.Dataset.map`."
        ) from error
    except (TypeError, RuntimeError):
        # Torch, of tensors on a GPU, in bfloat16 or with a gradient. Imported
        # here: reading a data set or drawing a box needs no Keras.
        import keras

        return keras.ops.convert_to_numpy(x)


def to_strings(x, name: str) -> tuple[list[str], bool]:
    """Converts text to Python strings, and says whether it is one example.

    Args:
        x: A string, UTF-8 bytes, or a list, tuple, array or eager tensor of
            them.
        name: String, what an error calls `x`.

    Returns:
        `(strings, batched)`: a list of strings, and `False` where `x` was one
        string.

    Raises:
        ValueError: an element is not text, or not UTF-8, or there is none.

    Example:

    >>> to_strings(b"caption en", "prompts")
    (['caption en'], False)
    """
    if not isinstance(x, (str, bytes, list, tuple)):
        x = to_numpy(x).tolist()
    batched = isinstance(x, (list, tuple))
    if batched and not x:
        raise ValueError(
            f"`{name}` is empty. Expected: at least one string. Received: {x}."
        )
    strings = [
        _to_string(s, name, i) for i, s in enumerate(x if batched else [x])
    ]
    return strings, batched


def _to_string(x, name, index):
    if not isinstance(x, (str, bytes)):
        x = to_numpy(x).tolist()
    if isinstance(x, bytes):
        try:
            x = x.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`{name}` holds bytes that are not UTF-8. Expected: strings "
                f"or UTF-8 bytes. Received: {x[:40]!r} at index {index}. "
                "Decode them with their own encoding first."
            ) from error
    if not isinstance(x, str):
        raise ValueError(
            f"`{name}` holds something that is not text. Expected: a string "
            f"or a list of strings. Received: {x!r} of type "
            f"{type(x).__name__} at index {index}."
        )
    return x
