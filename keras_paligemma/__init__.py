"""PaliGemma 2 for Keras 3.

Names are loaded on first use: importing the package imports neither KerasHub
nor TensorFlow, and a command that needs no model does not load one. The stub
`__init__.pyi` lists the module of each name, also for type checkers.
"""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

if "keras_hub" in sys.modules:
    # KerasHub is loaded already, so a lazy import saves nothing. With this
    # import, `from_preset` of KerasHub's base classes finds our classes.
    import keras_paligemma.models.causal_lm  # noqa: F401
