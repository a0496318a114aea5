"""Programs of tests run once or twice: they are made quickly, not fast."""

import contextlib
import functools
import itertools

import keras
import numpy as np
from keras import initializers
from keras import ops


@functools.cache
def make_programs_quickly():
    """Leave out what takes longer than it saves, or what only messages need.

    It lasts as long as the process.
    """
    draw_with_numpy()
    if keras.backend.backend() == "jax":
        share_mlir_context()
    if keras.backend.backend() == "tensorflow":
        leave_unoptimized()
        leave_out_stacks()


def draw_with_numpy():
    """Initialize weights without compiling a program for each shape."""
    by_backend = initializers.RandomNormal.__call__

    def normal(self, shape, dtype=None):
        if not isinstance(self.seed, int):
            return by_backend(self, shape, dtype)
        values = np.random.default_rng(self.seed).standard_normal(shape)
        return _place(self.mean + self.stddev * values, dtype)

    def zeros(self, shape, dtype=None):
        return _place(np.zeros(shape), dtype)

    initializers.RandomNormal.__call__ = normal
    initializers.Zeros.__call__ = zeros


def _place(values, dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    if dtype != "bfloat16":
        return ops.convert_to_tensor(values.astype(dtype))
    return ops.cast(ops.convert_to_tensor(values.astype("float32")), dtype)


def share_mlir_context(programs=500):
    """Write JAX's programs in one context, not in one each.

    A new context loads all dialects, which takes longer than to write a small
    program. It keeps the constants of its programs, so a new one follows after
    so many.
    """
    from jax._src.interpreters import mlir

    make, numbers = mlir.make_ir_context, itertools.count()

    # Models of servers are compiled in threads, so nothing here has a state of
    # its own that two of them could change.
    @functools.lru_cache(maxsize=1)
    def context(number):
        return make()

    mlir.make_ir_context = lambda: context(next(numbers) // programs)


def leave_unoptimized():
    """Turn off the graph optimizer of TensorFlow."""
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": True}
    )


def leave_out_stacks():
    """Make operations of TensorFlow's graphs without their Python stacks.

    Each operation would read it anew, for messages of errors alone.
    """
    from tensorflow.python.framework import ops as framework

    framework._create_c_op = functools.partial(
        framework._create_c_op, extract_traceback=False
    )


@contextlib.contextmanager
def run_eagerly():
    """Run TensorFlow's functions without tracing; other backends as they do."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)
