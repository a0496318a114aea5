"""Whether a job fits on chips that nobody has rented yet, and how.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Job": "job",
    "Plan": "planner",
    "make_plan": "planner",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
