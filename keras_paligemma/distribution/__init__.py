"""One chip to a pod: where weights lie, and whether a training step fits.

Names are loaded on first use.
"""

import importlib

_HOME = {
    "Layout": "layouts",
    "Sharded": "layouts",
    "auto": "choice",
    "distribute": "layouts",
    "make_plan": "plan",
}

__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted([*globals(), *__all__])
