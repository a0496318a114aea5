"""A model's forward pass for LiteRT, formerly TensorFlow Lite."""

from typing import Any

import tensorflow as tf

from keras_paligemma.export.forward import response_logits
from keras_paligemma.export.forward import shapes_and_dtypes

ENTRY = "model.tflite"


def write(model, folder):
    """Write `model.tflite`, and `model_int8.tflite`, a third of its size.

    The second has dynamic-range quantisation: int8 weights with a scale per
    channel, and activations that are quantised at run time.

    Args:
        model: `PaliGemmaCausalLM` of the TensorFlow backend, with a
            preprocessor.
        folder: path of an empty folder.

    Raises:
        ValueError: the blocks are scanned.
    """
    if model.backbone.text_decoder.blocks.scanned:
        raise ValueError(
            "LiteRT has no loop over the blocks for batches of any size. "
            "Received: a model of form 'scanned'. Expected: one that is "
            "loaded with form='unrolled'."
        )

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, *shape), dtype, name)
            for name, (shape, dtype) in shapes_and_dtypes(model).items()
        ],
        autograph=False,
    )
    def forward(images, token_ids, padding_mask, response_mask):
        inputs = {
            "images": images,
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "response_mask": response_mask,
        }
        return {"logits": response_logits(model, inputs)}

    owner: Any = tf.Module()
    owner.weights = [variable.value for variable in model.backbone.variables]
    traced = [forward.get_concrete_function()]
    for name, optimizations in (
        ("model_int8.tflite", [tf.lite.Optimize.DEFAULT]),
        (ENTRY, []),
    ):
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            traced, owner
        )
        converter.optimizations = optimizations
        (folder / name).write_bytes(converter.convert())
