"""Runs that can be killed, watched, and started from the command line.

Names are loaded on first use.
"""

import importlib

_HOME = {
    "RunCheckpoint": "checkpoint",
    "SamplePredictions": "samples",
    "Settings": "run",
    "estimate_memory": "memory",
    "finetune": "run",
    "fit": "checkpoint",
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
