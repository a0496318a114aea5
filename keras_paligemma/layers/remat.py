"""Rematerialisation: what is saved for the backward pass of a block."""

import contextlib

import keras
from keras import ops

from keras_paligemma.compat import platform

REMATS = (None, "dots", "block", "pair")


def rematerialize(function, kind, variables=()):
    """Wrap a function so that its backward pass recomputes some of it.

    Args:
        function: function of tensors.
        kind: `None` saves everything; "block" saves the arguments only, at
            the cost of a second forward pass; "dots" (JAX only) also saves
            the results of matrix products with a weight and recomputes what
            is cheap. "pair" is "block", with an even number of scanned blocks
            processed two at a time: half as much is saved, for half a forward
            pass more.
        variables: trained variables that the function reads by itself. They
            are read here and passed to it: in a TensorFlow loop, a variable
            that is read again has no gradient.

    Returns:
        Function of the same arguments.

    Raises:
        ValueError: unknown kind, or not available on this backend.
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
    """Rematerialise with float arguments only; the others are closed over.

    TensorFlow sums the gradients of arguments that several blocks share. It
    has no such sum for a bool mask.
    """
    values = [ops.convert_to_tensor(variable) for variable in variables]

    def call(*arguments):
        flat = keras.tree.flatten(arguments)
        places = [
            place
            for place, array in enumerate(flat)
            if keras.backend.is_float_dtype(
                keras.backend.standardize_dtype(array.dtype)
            )
        ]

        def of_floats(*floats):
            tensors, whole = floats[: len(values)], list(flat)
            for place, array in zip(places, floats[len(values) :], strict=True):
                whole[place] = array
            scope = contextlib.nullcontext()
            if variables:
                pairs = list(zip(variables, tensors, strict=True))
                scope = keras.StatelessScope(pairs)
            with scope:
                return function(*keras.tree.pack_sequence_as(arguments, whole))

        floats = [flat[place] for place in places]
        return keras.remat(of_floats)(*values, *floats)

    return call


def recompute(function):
    """Save only a function's arguments for its backward pass.

    For results that are cheap to compute and large to save: the weights of
    attention, and the intermediate values of a gelu. A gated MLP saves four
    arrays (B, T, F) without it, two with it. JAX on CPUs and GPUs only. Other
    backends get the function unchanged; so do TPUs, where whole blocks are
    rematerialised and attention is one kernel.

    XLA:CPU merges the two forward passes of `jax.checkpoint` into one, so here
    the first argument depends on the gradient, see `after`.

    Args:
        function: function of tensors that returns one tensor. Only floats get
            a gradient.

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
    """Make tensors depend on `x` without changing their values.

    Otherwise a compiler may compute results of these tensors early, for all
    layers at once. Or it may merge them with equal expressions of the forward
    pass, and save those. XLA:CPU removes optimization barriers before it merges
    expressions; elsewhere a barrier is better, since reading an element of `x`
    would cost communication between devices.

    Args:
        x: tensor.
        *tensors: tensors of signed numbers.

    Returns:
        list of the tensors with the same values; unchanged on Torch.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return list(tensors)
    if backend == "jax" and platform() != "cpu":
        import jax

        return list(jax.lax.optimization_barrier((x, *tensors))[1:])
    # Never true, not even for NaN, but no compiler can prove it.
    first, last = (
        ops.cast(ops.absolute(ops.reshape(tensor, (-1,))[0]), "float32")
        for tensor in (x, tensors[-1])
    )
    never = last < -first
    return [ops.where(never, -tensor, tensor) for tensor in tensors]


def check_remat(kind):
    """Raise `ValueError` if the backend has no such kind of remat."""
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
