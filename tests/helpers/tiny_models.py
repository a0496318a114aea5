"""Tiny models of unequal sizes, golden inputs, and errors between arrays."""

from pathlib import Path

import keras
import numpy as np

from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine

GOLDEN = Path(__file__).parents[1] / "golden"
PRESETS = Path(__file__).parents[2] / "presets"

# The sizes of the goldens: query heads differ from key-value heads, the width
# from heads × head_dim, and the MLP's width from twice the width.
VISION = {
    "patch_size": 14,
    "num_layers": 3,
    "hidden_dim": 48,
    "num_heads": 4,
    "intermediate_dim": 88,
}
TEXT = {
    "vocabulary_size": 320,
    "num_layers": 3,
    "hidden_dim": 64,
    "intermediate_dim": 112,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attention_scalar": 24,
}
IMAGE_SIZE = 42
FORMS = ("unrolled", "scanned")
# For tests of something else than the form: each runs in both forms, but not on
# each backend, since most of its time is tracing. The tests of layers,
# backbones, losses and quantization run both forms everywhere. The first form
# is the one of models that a test builds without naming one.
FORMS_OF_BACKEND = {
    "jax": FORMS[1:],
    "tensorflow": FORMS[:1],
    "torch": FORMS,
}[keras.backend.backend()]
# Fields of the golden model that its shapes do not determine.
NOT_IN_SHAPES = {
    "query_pre_attention_scalar": 24,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
}


def fill(backbone, arrays, prefix="params/"):
    """Load arrays in big_vision's layout into a backbone."""
    engine.load(
        backbone.weights_by_name(),
        big_vision.rows(backbone.text_config.use_post_norms, prefix),
        engine.Arrays(arrays),
    )


def arrays_of(backbone):
    """Return all weights as NumPy arrays by name; blocks are stacked."""
    return {
        name: weight.read()
        for name, weight in backbone.weights_by_name().items()
    }


def assert_same_weights(found, wanted):
    """Check that two backbones have bitwise equal weights."""
    found, wanted = arrays_of(found), arrays_of(wanted)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


def randomize_adapters(backbone, seed):
    """Set random values for the active adapter, as if it were trained."""
    random = np.random.default_rng(seed)
    for name, weight in backbone.weights_by_name().items():
        if name.endswith(("adapter_a", "adapter_b")):
            for variable in weight.variables:
                variable.assign(random.normal(size=variable.shape) * 0.2)


def run(function, inputs):
    """Call a model; jit on JAX, which otherwise compiles each operation."""
    return jitted(function)(inputs)


def jitted(function):
    """Compile a function of tensors on JAX; return it unchanged elsewhere.

    The variables of a model are arguments. As constants they would be folded,
    and each model would have a program of its own in JAX's cache.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    variables = getattr(function, "variables", [])

    @jax.jit
    def of_values(values, inputs):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(inputs)

    return lambda inputs: of_values([v.value for v in variables], inputs)


def error(actual, wanted):
    """Return the largest difference divided by the largest expected value."""
    actual = keras.ops.convert_to_numpy(actual)
    return np.abs(actual - wanted).max() / np.abs(wanted).max()


def golden_inputs(expected):
    """Return the golden training batch, left-packed, with valid padding."""
    ids = expected["in/train/text"][:, :-1]
    return {
        "images": expected["in/image"][:4],
        "token_ids": ids,
        "padding_mask": np.ones(ids.shape, bool),
        "response_mask": expected["in/train/mask_ar"][:, :-1].astype(bool),
    }


def golden_training(expected):
    """Return the golden training batch for `fit`: inputs, targets, weights.

    The original's forward pass omits the last token. Ours embeds it after all
    positions that are compared.
    """
    ids = expected["in/train/text"]
    x = {
        "images": expected["in/image"][:4],
        "token_ids": ids,
        "padding_mask": np.ones(ids.shape, bool),
        "response_mask": expected["in/train/mask_ar"].astype(bool),
    }
    weights = expected["in/train/mask_loss"][:, 1:].astype("float32")
    return x, ids[:, 1:], weights


def golden_prompts(expected, room=10, response=8):
    """Return the golden evaluation prompts, aligned to the right.

    There are four prompts of different lengths. The fourth has a begun
    response. (The goldens' fifth row is empty and only fills a batch.)
    """
    ids = np.zeros((4, room + response), "int32")
    valid, begun = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
    for row in range(4):
        is_input = expected["in/eval/mask_input"][row].astype(bool)
        is_response = expected["in/eval/mask_ar"][row].astype(bool)
        prompt = expected["in/eval/text"][row][is_input & ~is_response]
        start = expected["in/eval/text"][row][is_input & is_response]
        here = slice(room - len(prompt), room + len(start))
        ids[row, here] = np.concatenate([prompt, start])
        valid[row, here] = True
        begun[row, room : room + len(start)] = True
    return {
        "images": expected["in/image"][:4],
        "token_ids": ids,
        "padding_mask": valid,
        "response_mask": begun,
    }


def transformers_backbone(model, **changes):
    """Return our backbone with the sizes and weights of transformers' model."""
    from keras_paligemma import PaliGemmaBackbone
    from tests.helpers.transformers_reference import transformers_to_big_vision

    text, vision = model.config.text_config, model.config.vision_config
    second = text.model_type == "gemma2"
    backbone = PaliGemmaBackbone(
        vision.image_size,
        {
            "patch_size": vision.patch_size,
            "num_layers": vision.num_hidden_layers,
            "hidden_dim": vision.hidden_size,
            "num_heads": vision.num_attention_heads,
            "intermediate_dim": vision.intermediate_size,
        },
        {
            "vocabulary_size": text.vocab_size,
            "num_layers": text.num_hidden_layers,
            "hidden_dim": text.hidden_size,
            "intermediate_dim": text.intermediate_size,
            "num_query_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "query_pre_attention_scalar": (
                text.query_pre_attn_scalar if second else text.head_dim
            ),
            "attention_logit_soft_cap": 50.0 if second else None,
            "final_logit_soft_cap": 30.0 if second else None,
            "use_post_norms": second,
        },
        **changes,
    )
    arrays = transformers_to_big_vision(model.state_dict(), model.config)
    prefix = "params/" if "params/img/embedding/bias" in arrays else ""
    fill(backbone, arrays, prefix)
    return backbone


def transformers_inputs():
    """Return two rows with different padding, and the valid positions."""
    random = np.random.default_rng(5)
    valid = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)
    response = np.array([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]], bool)
    inputs = {
        "images": random.uniform(-1, 1, (2, 21, 21, 3)).astype("float32"),
        "token_ids": random.integers(1, 101, valid.shape) * valid,
        "padding_mask": valid,
        "response_mask": response,
    }
    return inputs, np.pad(valid, ((0, 0), (9, 0)), constant_values=True)
