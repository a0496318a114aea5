"""Runs that can be killed, watched, and started from the command line.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "EvaluateObjects": "objects",
    "RunCheckpoint": "checkpoint",
    "SamplePredictions": "samples",
    "Settings": "run",
    "finetune": "run",
    "fit": "checkpoint",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
