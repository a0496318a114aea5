"""The model card's benchmarks: data, answers, metric, report.

Names are loaded on first use.
"""

from keras_paligemma.lazy import attach

_HOME = {
    "Benchmark": "registry",
    "Evaluation": "run",
    "Sample": "samples",
    "Samples": "samples",
    "TrainingSource": "finetuning",
    "benchmarks": "registry",
    "evaluate": "run",
    "find_benchmark": "registry",
    "open_samples": "sources",
    "read_predictions": "predictions",
    "score": "scoring",
    "settings_of": "finetuning",
    "training_samples": "finetuning",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
