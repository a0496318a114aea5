"""TensorFlow's graphs as they are traced."""

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
