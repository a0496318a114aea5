"""Python imports this file at its start; then some packages are not there."""

import os
from importlib.machinery import PathFinder

HIDDEN = os.environ.get("HIDDEN_PACKAGES", "tensorflow matplotlib pandas")
find = PathFinder.find_spec


def find_spec(name, path=None, target=None):
    """Find a module other than the hidden ones."""
    return None if name in HIDDEN.split() else find(name, path, target)


if os.environ.get("KERAS_BACKEND") != "tensorflow":
    PathFinder.find_spec = find_spec
