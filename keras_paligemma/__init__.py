"""PaliGemma 2 for Keras 3.

Names are loaded on first use: importing the package costs no KerasHub and no
TensorFlow, and a command that needs no model never pays for one. Where each
name lives is said once, in `__init__.pyi`, which type checkers read too.
"""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"

if "keras_hub" in sys.modules:
    # Then nothing is saved by being lazy, and `from_preset` of KerasHub's base
    # classes finds our classes without a further import.
    import keras_paligemma.models.causal_lm  # noqa: F401
