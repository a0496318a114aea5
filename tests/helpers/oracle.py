"""A stand-in for a model that returns given answers.

It preprocesses pictures and prompts as a model does. It looks up its answers by
the resulting arrays, so that a run that mixes up rows is detected.
"""

import types

import keras_hub
import numpy as np

from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.helpers.tiny_models import GOLDEN

TOKENIZER = GOLDEN / "english_sp.model"


def make_preprocessor():
    return PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER.read_bytes()),
        PaliGemmaImageConverter(28),
        prompt_length=256,
        response_length=8,
    )


class Oracle:
    """An oracle that answers the samples of a benchmark.

    Args:
        samples: `Samples`.
        answers: list of str, one per sample.
        weight: float, its only weight.
    """

    def __init__(self, samples, answers, weight=0):
        self.preprocessor = make_preprocessor()
        self.backbone = types.SimpleNamespace(
            text_config=types.SimpleNamespace(hidden_dim=2304),
            image_size=224,
            compute_dtype="float32",
            # A NumPy array, because JAX's threads do not survive a fork.
            weights=[np.array([float(weight)])],
        )
        self.sampler = keras_hub.samplers.GreedySampler()
        self.generate_function = None
        self.calls = 0
        self.answers = {}
        for row, answer in enumerate(answers):
            sample = samples[row]
            inputs = {"images": [sample.images], "prompts": [sample.prompt]}
            [key] = self.keys(inputs)
            assert self.answers.setdefault(key, answer) == answer
        assert len(self.answers) == len(samples)

    def keys(self, inputs):
        arrays = self.preprocessor.generate_preprocess(
            dict(inputs), max_new_tokens=8
        )
        return [
            (picture.tobytes(), ids.tobytes())
            for picture, ids in zip(
                arrays["images"], arrays["token_ids"], strict=True
            )
        ]

    def generate(self, inputs, max_new_tokens):
        self.calls += 1
        assert max_new_tokens >= 24
        return [self.answers[key] for key in self.keys(inputs)]
