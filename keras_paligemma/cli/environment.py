"""The environment of a command: which backend, and no log messages."""

import contextlib
import importlib.abc
import importlib.util
import logging
import os
import sys


@contextlib.contextmanager
def command_environment():
    """Silence log messages, and hide TensorFlow if it is not the backend.

    Python's errors and warnings are for the user. Log messages come from Orbax,
    absl and TensorFlow.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not os.environ.get("KERAS_BACKEND"):
        # For Keras, an empty name is none.
        os.environ.pop("KERAS_BACKEND", None)
    for name in ("stdin", "stdout", "stderr"):
        # Closed by whoever starts the command. Libraries write to it, and the
        # next file that is opened would get its number.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))
    logging.disable(logging.ERROR)
    finder = NoTensorFlow()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in HIDDEN:
            if sys.modules.get(name, finder) is None:
                del sys.modules[name]
        logging.disable(logging.NOTSET)


HIDDEN = ("tensorflow", "tensorflow_text")


class NoTensorFlow(importlib.abc.MetaPathFinder):
    """Hide TensorFlow from KerasHub, which imports it if it is installed.

    KerasHub works without it, and importing it takes seconds.
    """

    def find_spec(self, name, path=None, target=None):
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        if backend == "tensorflow" or name not in ("keras", *HIDDEN):
            return None
        # From when Keras is imported, `find_spec` reports it as not installed.
        # An error there would turn off JAX's compilation cache, and Torch could
        # not be imported.
        for hidden in HIDDEN:
            # Python accepts `None` here, which typeshed does not declare.
            sys.modules.setdefault(hidden, None)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if name in HIDDEN:
            raise ModuleNotFoundError(
                f"{name} is hidden: the backend is {backend}.", name=name
            )
        return None


def use_any_backend():
    """Choose a backend for a command whose result does not depend on it."""
    for backend, module in (("jax", "jax"), ("torch", "torch")):
        if importlib.util.find_spec(module) is not None:
            os.environ.setdefault("KERAS_BACKEND", backend)


@contextlib.contextmanager
def quiet_imports():
    """Discard what C++ libraries print to standard error on import.

    TensorFlow's messages about processors and drivers cannot be turned off.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def data_parallel(multi_host: bool = False):
    """Use data parallelism if JAX has several devices.

    Args:
        multi_host: bool, whether to join the other hosts of the run first.
    """
    import keras

    if multi_host:
        keras.distribution.initialize()
    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        if len(devices) > 1 and keras.distribution.distribution() is None:
            distribution = keras.distribution.DataParallel(devices=devices)
            keras.distribution.set_distribution(distribution)
