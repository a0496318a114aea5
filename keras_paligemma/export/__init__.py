"""Models as files that other programs serve.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {"export": "targets"}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
