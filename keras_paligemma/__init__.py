"""PaliGemma 2 for Keras 3.

Names are loaded on first use: importing the package costs no KerasHub and no
TensorFlow, and a command that needs no model never pays for one.
"""

import sys

from keras_paligemma.lazy import attach

_HOME = {
    "Adam": "tuning.optimizers",
    "Answer": "generation.answer",
    "PaliGemmaBackbone": "models.backbone",
    "PaliGemmaCausalLM": "models.causal_lm",
    "PaliGemmaCausalLMPreprocessor": "preprocessing.preprocessor",
    "PaliGemmaImageConverter": "preprocessing.image_converter",
    "PaliGemmaTokenizer": "preprocessing.tokenizer",
    "StreamedCrossEntropy": "tuning.losses",
    "TextDecoderConfig": "config",
    "VisionEncoderConfig": "config",
    "keep_compilations": "generation.programs",
    "transfer_recipe": "tuning.optimizers",
    "without_values": "compat",
}

__all__ = list(_HOME)
__version__ = "0.1.0"
__getattr__, __dir__ = attach(__name__, _HOME)

if "keras_hub" in sys.modules:
    # Then nothing is saved by being lazy, and `from_preset` of KerasHub's base
    # classes finds our classes without a further import.
    import keras_paligemma.models.causal_lm  # noqa: F401
