"""Python imports this file at its start; then there is no TensorFlow."""

import os
from importlib.machinery import PathFinder

find = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    """Find a module other than TensorFlow."""
    return None if name == "tensorflow" else find(name, path, target)


if os.environ.get("KERAS_BACKEND") != "tensorflow":
    PathFinder.find_spec = find_spec
