"""What the backward pass keeps of a block, and what it computes again."""

import keras

REMATS = (None, "block", "dots")


def rematerialize(function, kind):
    """Wrap a function so that its backward pass recomputes some of it.

    Args:
        function: of tensors.
        kind: `None` keeps everything; "block" keeps the arguments alone, at
            the price of a second forward pass; "dots" (JAX alone) keeps the
            results of matrix products with a weight too and recomputes what
            is cheap.

    Returns:
        Function of the same arguments.

    Raises:
        ValueError: unknown kind, or one that the backend has not.
    """
    check_remat(kind)
    if kind is None:
        return function
    if kind == "block":
        return keras.remat(function)
    import jax

    return jax.checkpoint(
        function,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )


def check_remat(kind):
    """Refuse a kind that does not exist here."""
    if kind not in REMATS:
        raise ValueError(
            f"Unknown remat. Received: {kind!r}. Expected one of {REMATS}."
        )
    backend = keras.backend.backend()
    if kind == "dots" and backend != "jax":
        raise ValueError(
            "remat='dots' chooses what to keep by a policy of JAX. Received: "
            f"the {backend} backend. Expected: 'block' or None there."
        )
