"""A tiny random model with a preprocessor."""

import keras
import numpy as np

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma import without_values
from keras_paligemma.compat import fill
from tests.helpers.tiny_models import FORMS_OF_BACKEND
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION

# The tower has more layers than the decoder, as in 3b. Both have few, since
# most of a test's time is compiling them. The vocabulary is the tokenizer's.
TEXT_2048 = TEXT | {"vocabulary_size": 2048, "num_layers": 2}
TOKENIZER = GOLDEN / "english_sp.model"


def build_tiny_model(form=FORMS_OF_BACKEND[0], **changes):
    """Build a random model that reads and writes text."""
    keras.utils.set_random_seed(0)
    backbone = PaliGemmaBackbone(
        IMAGE_SIZE, VISION, TEXT_2048, form=form, **changes
    )
    # The projector starts at zero, where pictures would have no effect.
    backbone.weights_by_name()["vision_encoder/projector/kernel"].assign(
        np.random.default_rng(0).normal(size=(48, 64)) * 0.3
    )
    return PaliGemmaCausalLM(backbone, tiny_preprocessor())


def tiny_preprocessor():
    """Return a preprocessor with the nano preset's tokenizer."""
    return PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER.read_bytes()),
        PaliGemmaImageConverter(IMAGE_SIZE),
        prompt_length=12,
        response_length=8,
    )


def write_random_preset(folder, vision=VISION, text=TEXT_2048):
    """Write a preset of random floats, drawn by NumPy."""
    with without_values():
        backbone = PaliGemmaBackbone(IMAGE_SIZE, vision, text)
    random = np.random.default_rng(0)
    for variable in backbone.variables:
        fan_in = max(np.prod(variable.shape[:-1]), 1)
        fill(variable, random.normal(size=variable.shape) / fan_in**0.5)
    PaliGemmaCausalLM(backbone, tiny_preprocessor()).save_to_preset(folder)


def prompts_of(examples):
    """Return the inputs of `generate` from examples for `fit`."""
    return {key: examples[key] for key in ("images", "prompts")}
