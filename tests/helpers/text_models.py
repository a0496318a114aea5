"""A tiny random model that reads and writes text."""

import keras
import numpy as np

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import PRESETS
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION

TOKENIZER = PRESETS / "pali_gemma2_nano_112" / "tokenizer.model"


def build_tiny_model(**changes):
    """Build a random model that reads and writes text."""
    keras.utils.set_random_seed(0)
    backbone = PaliGemmaBackbone(
        IMAGE_SIZE,
        # More than the decoder's, as a 3b has it.
        VISION | {"num_layers": 4},
        TEXT | {"vocabulary_size": 2048},
        **changes,
    )
    # The projector starts at zero; a test of pictures needs it awake.
    backbone.vision_encoder.projector.kernel.assign(
        np.random.default_rng(0).normal(size=(48, 64)) * 0.3
    )
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER.read_bytes()),
        PaliGemmaImageConverter(IMAGE_SIZE),
        prompt_length=12,
        response_length=8,
    )
    return PaliGemmaCausalLM(backbone, preprocessor)
