"""One chip to a pod: where weights lie, and whether a training step fits.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Layout": "layouts",
    "Sharded": "layouts",
    "auto": "choice",
    "data_shard": "layouts",
    "distribute": "layouts",
    "make_plan": "plan",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
