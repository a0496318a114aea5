"""TensorFlow's graphs: left as they are traced, or not made at all."""

import contextlib

import keras


def leave_unoptimized():
    """Turn off the graph optimizer of TensorFlow, if that is the backend.

    It takes longer than the small models of the tests run.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": True}
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
