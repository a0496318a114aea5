"""Each layer in bfloat16: recreation from its config, and its dtypes."""

import numpy as np
import pytest
from keras import ops

from keras_paligemma.layers.attention import GroupedQueryAttention
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.attention import rotary_angles
from keras_paligemma.layers.blocks import MLP
from keras_paligemma.layers.blocks import DecoderBlock
from keras_paligemma.layers.blocks import EncoderBlock
from keras_paligemma.layers.blocks import GatedMLP
from keras_paligemma.layers.blocks import RMSNorm
from keras_paligemma.layers.projection import Projection
from keras_paligemma.models.text_decoder import TokenEmbedding
from tests.helpers.layer_contract import assert_layer_contract

X = ops.cast(np.random.default_rng(0).normal(size=(2, 3, 8)), "bfloat16")
MASK = attention_mask(np.ones((2, 3), bool), np.zeros((2, 3), bool))
ANGLES = rotary_angles(np.tile(np.arange(3), (2, 1)), 4)
HEADS = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
# Arguments that differ from their defaults, and the inputs of the call.
LAYERS = [
    (RMSNorm, {"dim": 8, "epsilon": 1e-3}, (X,)),
    (Projection, {"input_axes": (8,), "output_axes": (2, 5)}, (X,)),
    (
        Projection,
        {"input_axes": (8,), "output_axes": (6,), "quantization": "int8"},
        (X,),
    ),
    (GatedMLP, {"hidden_dim": 8, "intermediate_dim": 12}, (X,)),
    (MLP, {"hidden_dim": 8, "intermediate_dim": 12}, (X,)),
    (
        GroupedQueryAttention,
        {"hidden_dim": 8, "query_scale": 0.3, "logit_soft_cap": 5.0} | HEADS,
        (X, MASK, ANGLES),
    ),
    (
        DecoderBlock,
        {"hidden_dim": 8, "intermediate_dim": 12, "query_scale": 0.3} | HEADS,
        (X, MASK, ANGLES),
    ),
    (
        EncoderBlock,
        {"hidden_dim": 8, "intermediate_dim": 12, "num_heads": 2},
        (X,),
    ),
    (
        TokenEmbedding,
        {"vocabulary_size": 9, "hidden_dim": 8, "logit_soft_cap": 5.0},
        (np.array([[1, 8, 0]]),),
    ),
]


@pytest.mark.parametrize(
    "cls, arguments, inputs",
    LAYERS,
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_layer(cls, arguments, inputs):
    assert_layer_contract(cls(**arguments, dtype="bfloat16"), inputs)


def test_logits_are_float32():
    layer = TokenEmbedding(9, 8, dtype="bfloat16")
    assert_layer_contract(layer, (X,), "float32", reverse=True)
