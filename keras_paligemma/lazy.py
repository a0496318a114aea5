"""Names of a package that are loaded when they are first asked for."""

import importlib
import sys


def attach(package, homes):
    """Make the functions that a package of lazy names has.

    Args:
        package: str, its `__name__`.
        homes: dict of a public name to the module below that defines it.

    Returns:
        `__getattr__` and `__dir__` of the package.
    """

    def load(name):
        if name not in homes:
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}"
            )
        module = importlib.import_module(f"{package}.{homes[name]}")
        value = getattr(module, name)
        # Found without this function from now on.
        setattr(sys.modules[package], name, value)
        return value

    def names():
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
