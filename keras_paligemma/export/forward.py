"""The pass that every target can hold: pixels and tokens in, logits out."""

import numpy as np

from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse

INPUTS = ("images", "token_ids", "padding_mask", "response_mask")


def shapes_and_dtypes(model):
    """Tell of each input the shape behind the batch, and the dtype.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor, whose lengths these are.

    Returns:
        Dict of pairs, by the names of `INPUTS` and in their order.
    """
    preprocessor = model.preprocessor
    size = preprocessor.image_converter.image_size
    text = (preprocessor.prompt_length + preprocessor.response_length,)
    return {
        "images": ((*size, 3), np.dtype("float32")),
        "token_ids": (text, np.dtype("int32")),
        "padding_mask": (text, np.dtype("bool")),
        "response_mask": (text, np.dtype("bool")),
    }


def response_logits(model, inputs):
    """Return the logits of each token of a response, from those before it.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        inputs: dict of tensors by the names of `INPUTS`, (B, …), as the
            preprocessor lays them out.

    Returns:
        float32 tensor (B, R, V).
    """
    longest = model.preprocessor.response_length
    text = PromptAndResponse.cut(inputs, longest)
    hidden_BLD = model.backbone(inputs)
    return model.backbone.logits(text.predicting(hidden_BLD))
