"""Files and data sets to the batches that `fit` takes.

A source is any object of a length whose `[index]` gives one example, a
dictionary of `images` (a picture, or a list of frames), `prompts` (a string)
and `responses` (a string, or a list of strings of which one is drawn each
epoch). `Batches` makes batches of a source. Names are loaded on first use.
"""

import importlib

_HOME = {
    "Batches": "pipeline",
    "COCOSource": "coco",
    "ExampleError": "examples",
    "FieldSource": "fields",
    "JSONLSource": "jsonl",
    "check": "examples",
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
