"""What a backbone is given: checked, and completed by the image tokens."""

import keras
import numpy as np
from keras import ops


def full_masks(inputs, num_image_tokens):
    """Put image tokens, always valid and never response, before the masks.

    Without a response mask nothing is response: all tokens see one another.
    """
    padding_BT = ops.cast(inputs["padding_mask"], "bool")
    response_BT = inputs.get("response_mask")
    if response_BT is None:
        response_BT = ops.zeros_like(padding_BT)
    response_BT = ops.cast(response_BT, "bool")
    if num_image_tokens == 0:
        return padding_BT, response_BT
    shape = (ops.shape(padding_BT)[0], num_image_tokens)
    return (
        ops.concatenate([ops.ones(shape, "bool"), padding_BT], axis=1),
        ops.concatenate([ops.zeros(shape, "bool"), response_BT], axis=1),
    )


def check_images(images, image_size):
    """Refuse pictures whose rank, size or dtype the encoder cannot mean."""
    shape = tuple(images.shape)
    expected = (image_size, image_size, 3)
    if len(shape) not in (4, 5) or shape[-3:] != expected:
        raise ValueError(
            f"The backbone takes pictures of shape (batch, {image_size}, "
            f"{image_size}, 3) or (batch, frames, {image_size}, {image_size}, "
            f"3). Received: shape {shape}. PaliGemmaImageConverter makes "
            "them from any picture."
        )
    dtype = keras.backend.standardize_dtype(images.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"The backbone takes floats in [-1, 1]. Received: dtype {dtype}. "
            "PaliGemmaImageConverter makes them from 0…255."
        )


def check_token_ids(token_ids, vocabulary_size):
    """Refuse token ids that no row of the embedding stands for."""
    token_ids = np.asarray(token_ids)
    outside = (token_ids < 0) | (token_ids >= vocabulary_size)
    if outside.any():
        raise ValueError(
            f"Token ids must lie in 0…{vocabulary_size - 1}. Received: "
            f"{token_ids[outside][0]} at index "
            f"{tuple(int(i[0]) for i in outside.nonzero())}. Is this the "
            "tokenizer that belongs to the model?"
        )


def check_targets(inputs, y):
    """Refuse targets that are all tokens, shifted by one, as KerasHub's are.

    Ours are the response: the last columns of the token ids.
    """
    tokens = inputs["token_ids"].shape[-1]
    if y is not None and y.shape[-1] >= tokens:
        raise ValueError(
            "Targets are the response part of the token ids, not all tokens "
            f"shifted by one as in KerasHub. Received: y of {y.shape[-1]} "
            f"columns for {tokens} tokens. Expected: token_ids[:, "
            "-response_length:], as PaliGemmaCausalLMPreprocessor gives them."
        )
