"""One chip to a pod: on which chips which part of a weight lies.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Layout": "layouts",
    "Sharded": "layouts",
    "auto": "auto_distribution",
    "data_shard": "layouts",
    "distribute": "layouts",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
