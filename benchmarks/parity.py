"""Compare outputs with other implementations: `python -m benchmarks.parity`.

Prints the rows of the README's table for the backend of `KERAS_BACKEND`: the
largest difference as a share of the largest value, in float32. Run it from a
checkout that `make test` has set up.
"""

import argparse

import keras
import numpy as np
from keras import ops

from keras_paligemma import PaliGemmaBackbone
from tests.helpers import transformers_reference
from tests.helpers.numpy_reference import forward
from tests.helpers.numpy_reference import load_arrays
from tests.helpers.numpy_reference import settings_of
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import fill
from tests.helpers.tiny_models import golden_inputs
from tests.helpers.tiny_models import golden_prompts
from tests.helpers.tiny_models import transformers_backbone
from tests.helpers.tiny_models import transformers_inputs


def rows(form):
    """Yield the compared output, the other implementation, and the error."""
    arrays = load_arrays(GOLDEN / "tiny_headdim.npz")
    expected = dict(np.load(GOLDEN / "tiny_headdim.expected.npz"))
    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT, form=form)
    fill(backbone, arrays)
    inputs = golden_inputs(expected)
    hidden = backbone(inputs)
    images = backbone.encode_images(inputs["images"])
    yield (
        "image embeddings",
        "big_vision",
        error(images, expected["f32/img/zimg"]),
    )
    yield (
        "hidden states",
        "big_vision",
        error(hidden, expected["f32/llm/pre_logits"]),
    )
    yield (
        "logits",
        "big_vision",
        error(backbone.logits(hidden), expected["f32/llm/logits"]),
    )
    frames = {key: value[:2] for key, value in inputs.items()}
    frames["images"] = expected["in/video"]
    logits = backbone.token_embedding.logits(backbone(frames)[:, 18:])
    yield (
        "logits of two frames",
        "big_vision",
        error(logits, expected["f32/video/text_logits"]),
    )
    inputs = golden_prompts(expected)
    valid = np.pad(
        inputs["padding_mask"], ((0, 0), (9, 0)), constant_values=True
    )
    wanted = forward(arrays, settings_of(backbone.text_config), **inputs)
    hidden = ops.convert_to_numpy(backbone(inputs))
    yield (
        "hidden states, padded prompts",
        "NumPy, float64",
        error(hidden[valid], wanted["hidden_states"][valid]),
    )
    for version in (2, 1):
        model = transformers_reference.tiny_transformers_model(3, version)
        backbone = transformers_backbone(model, form=form)
        inputs, valid = transformers_inputs()
        wanted = transformers_reference.run(model, **inputs)
        logits = ops.convert_to_numpy(backbone.logits(backbone(inputs)))
        yield (
            f"logits, PaliGemma {version}",
            "transformers",
            error(logits[valid], wanted[valid]),
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for form in ("unrolled", "scanned"):
        for what, whom, found in rows(form):
            backend = keras.backend.backend()
            print(f"| {backend} {form} | {what} | {whom} | {found:.1e} |")
