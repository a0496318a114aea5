"""A stand-in for a model: it knows the right answers, or some others.

It preprocesses pictures and prompts as a model does and finds its answers by
what came out, so a run that mixes up rows is found out.
"""

import types

import numpy as np

from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.helpers.tiny_models import PRESETS

TOKENIZER = PRESETS / "pali_gemma2_nano_112" / "tokenizer.model"


def make_preprocessor():
    return PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER.read_bytes()),
        PaliGemmaImageConverter(28),
        prompt_length=256,
        response_length=8,
    )


class Oracle:
    """Answers the samples of a benchmark.

    Args:
        samples: `Samples`.
        answers: of each sample a string.
        weight: float, all that it has of weights.
    """

    def __init__(self, samples, answers, weight=0):
        self.preprocessor = make_preprocessor()
        self.backbone = types.SimpleNamespace(
            text_config=types.SimpleNamespace(hidden_dim=2304),
            image_size=224,
            # NumPy's: runs are forked, which JAX's threads do not survive.
            weights=[np.array([float(weight)])],
        )
        self.sampler = self.generate_function = None
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
