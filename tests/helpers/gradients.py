"""Gradients of a scalar with respect to all trained weights, per backend."""

import keras
import numpy as np
from keras import ops

from keras_paligemma.layers.weight import inputs_first


def gradients(function, model):
    """Differentiate a function with respect to a model's trained weights.

    Args:
        function: function of no arguments that returns a scalar.
        model: object with `weights_by_name`.

    Returns:
        Dict of name to array, with the layer axis first, and the inputs of
        kernels before their outputs.
    """
    weights = {
        name: weight
        for name, weight in model.weights_by_name().items()
        if weight.trainable
    }
    flat = [
        variable for weight in weights.values() for variable in weight.variables
    ]

    def loss(values):
        with keras.StatelessScope(list(zip(flat, values, strict=True))):
            return function()

    values = [ops.convert_to_tensor(variable.value) for variable in flat]
    found = iter(differentiate(loss, values))
    result = {}
    for name, weight in weights.items():
        layers = int(weight.form == "scanned")
        parts = [
            inputs_first(next(found), variable, layers)
            for variable in weight.variables
        ]
        unrolled = weight.form == "unrolled"
        result[name] = np.stack(parts) if unrolled else parts[0]
    return result


# XLA's default optimizations.
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_enable_concurrency_optimized_scheduler": True,
}


def differentiate(loss, values, optimized=False):
    """Return the gradients of a function of a list of tensors, as arrays.

    `optimized` compiles as users do on JAX, whatever XLA_FLAGS are set to save
    time. Sums have smaller rounding errors then.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        options = dict(OPTIMIZED) if optimized else {}
        # JAX 0.12 lacks this option, and raises an error.
        if optimized and jax.__version_info__ < (0, 12):
            options["xla_cpu_use_fusion_emitters"] = True
        compiled = jax.jit(jax.grad(loss), compiler_options=options)
        found = compiled(values)
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            total = loss(values)
        found = tape.gradient(total, values)
        found = [ops.convert_to_tensor(array) for array in found]
    else:
        values = [value.detach().requires_grad_() for value in values]
        loss(values).backward()
        found = [value.grad for value in values]
    return [ops.convert_to_numpy(array) for array in found]
