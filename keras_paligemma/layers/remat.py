"""What the backward pass keeps of a block, and what it computes again."""

import contextlib

import keras
from keras import ops

from keras_paligemma.compat import platform

REMATS = (None, "dots", "block", "pair")


def rematerialize(function, kind, variables=()):
    """Wrap a function so that its backward pass recomputes some of it.

    Args:
        function: of tensors.
        kind: `None` keeps everything; "block" keeps the arguments alone, at
            the price of a second forward pass; "dots" (JAX alone) keeps the
            results of matrix products with a weight too and recomputes what
            is cheap. "pair" is "block", and an even number of stacked blocks
            goes two at a time, so that half as much is kept, for half a
            forward pass more.
        variables: trained variables that the function reads by itself. A loop
            of TensorFlow has no gradient of one that is read again within it:
            they are read now, and lent to the function.

    Returns:
        Function of the same arguments.

    Raises:
        ValueError: unknown kind, or one that the backend has not.
    """
    check_remat(kind)
    if kind is None:
        return function
    if kind in ("block", "pair"):
        if keras.backend.backend() == "tensorflow":
            return _of_floats(function, list(variables))
        return keras.remat(function)
    import jax

    return jax.checkpoint(
        function,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )


def _of_floats(function, variables):
    """Recompute with the floats as arguments, and the rest closed over.

    TensorFlow adds up the gradients of what several blocks were given, of a
    mask too, and has no sum of bools.
    """
    values = [ops.convert_to_tensor(variable) for variable in variables]

    def call(*arguments):
        flat = keras.tree.flatten(arguments)
        places = [
            place
            for place, one in enumerate(flat)
            if keras.backend.is_float_dtype(
                keras.backend.standardize_dtype(one.dtype)
            )
        ]

        def of_floats(*floats):
            lent, whole = floats[: len(values)], list(flat)
            for place, one in zip(places, floats[len(values) :], strict=True):
                whole[place] = one
            scope = contextlib.nullcontext()
            if variables:
                pairs = list(zip(variables, lent, strict=True))
                scope = keras.StatelessScope(pairs)
            with scope:
                return function(*keras.tree.pack_sequence_as(arguments, whole))

        floats = [flat[place] for place in places]
        return keras.remat(of_floats)(*values, *floats)

    return call


def recompute(function):
    """Let a function's backward pass keep its arguments alone, cheaply.

    For what costs little to compute and much to keep: the weights of attention
    and what a gelu computes between. A block that keeps its activations keeps
    four arrays (B, T, F) of a gated MLP without it, two with it. JAX alone;
    other backends get the function as it is, and TPUs too: there blocks are
    recomputed whole, and attention is one kernel.

    XLA:CPU takes `jax.checkpoint` for the forward pass done again and merges
    the two, so here the first argument waits for the gradient, see `after`.

    Args:
        function: of tensors, to one tensor. Only floats get a gradient.

    Returns:
        Function of the same arguments.
    """
    if keras.backend.backend() != "jax" or platform() == "tpu":
        return function
    import jax

    def forward(*arguments):
        return function(*arguments), arguments

    def backward(arguments, gradient):
        first, *others = arguments
        (first,) = after(gradient, first)
        return jax.vjp(function, first, *others)[1](gradient)

    recomputing = jax.custom_vjp(function)
    recomputing.defvjp(forward, backward)
    return recomputing


def after(x, *tensors):
    """Return tensors as something that is known only after `x`.

    Nothing else keeps a compiler from computing what follows from them at
    once, for all layers, or from keeping it for the backward pass, where it
    finds the same expression. XLA:CPU drops optimization barriers before it
    looks for such; a number of `x` would cost several devices a message.

    Args:
        x: tensor.
        *tensors: of signed numbers.

    Returns:
        List of these tensors, of the same values; Torch's as they are.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return list(tensors)
    if backend == "jax" and platform() != "cpu":
        import jax

        return list(jax.lax.optimization_barrier((x, *tensors))[1:])
    # Never true, of NaN neither; no compiler knows that.
    first, last = (
        ops.cast(ops.absolute(ops.reshape(tensor, (-1,))[0]), "float32")
        for tensor in (x, tensors[-1])
    )
    never = last < -first
    return [ops.where(never, -tensor, tensor) for tensor in tensors]


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
