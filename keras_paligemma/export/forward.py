"""The forward pass that all formats export: pixels and tokens to logits."""

import numpy as np

from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse

INPUTS = ("images", "token_ids", "padding_mask", "response_mask")


def shapes_and_dtypes(model):
    """Return the shape without the batch, and the dtype, of each input.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor, which sets the lengths.

    Returns:
        dict of the names of `INPUTS`, in their order, to (shape, dtype).
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
    """Return the logits that predict each token of the response.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        inputs: dict of the names of `INPUTS` to tensors (B, …), as the
            preprocessor returns them.

    Returns:
        float32 tensor (B, R, V).
    """
    longest = model.preprocessor.response_length
    text = PromptAndResponse.cut(inputs, longest)
    hidden_BLD = model.backbone(inputs)
    return model.backbone.logits(text.predicting(hidden_BLD))
