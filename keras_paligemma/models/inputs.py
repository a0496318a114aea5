"""Validation of a model's inputs, and the masks of the image tokens."""

import numpy as np
from keras import ops

from keras_paligemma.preprocessing.inputs import is_numeric
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.inputs import to_numpy

# Dtypes of integer and bool inputs: a dtype policy is for floats alone.
DTYPES = {
    "token_ids": "int32",
    "prompt_ids": "int32",
    "response_ids": "int32",
    "positions": "int32",
    "padding_mask": "bool",
    "prompt_mask": "bool",
    "response_mask": "bool",
    "attention_mask": "bool",
}
# The arrays that `generate` takes.
PROMPT_ARRAYS = (
    "images",
    "image_embeddings",
    "token_ids",
    "padding_mask",
    "response_mask",
)


def full_masks(inputs, num_image_tokens):
    """Prepend image tokens, valid and not response, to the masks.

    Without a response mask all tokens are prefix: they attend to each other.
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
    """Raise on images of a wrong rank, size or dtype."""
    shape = tuple(images.shape)
    expected = (image_size, image_size, 3)
    known = len(shape) in (4, 5) and shape[-3:] == expected
    if not known or 0 in shape[1:-3]:
        raise ValueError(
            f"The backbone takes pictures of shape (batch, {image_size}, "
            f"{image_size}, 3) or (batch, frames, {image_size}, {image_size}, "
            f"3). Received: shape {shape}. PaliGemmaImageConverter makes "
            "them from any picture."
        )
    if "float" not in str(images.dtype):
        raise ValueError(
            f"The backbone takes floats in [-1, 1]. Received: dtype "
            f"{images.dtype}. PaliGemmaImageConverter makes them from 0…255."
        )


def typed(inputs, vocabulary_size):
    """Return ids as int32 and masks as bool, whatever the dtype policy.

    Keras casts floats to the policy's dtype, and bfloat16 cannot represent
    257. On JAX, with bfloat16 as floatx, Keras 3.15 converts arrays of
    integers and bools to floats, too.

    Args:
        inputs: dict as the backbone takes it.
        vocabulary_size: int. Ids are checked while they are concrete: in a
            compiled step an invalid id would read another row.

    Returns:
        Dict: a copy whose ids and masks are tensors.
    """
    inputs = dict(inputs)
    if isinstance(inputs.get("token_ids"), (np.ndarray, list, tuple)):
        inputs["token_ids"] = to_ids(
            inputs["token_ids"], "token_ids", vocabulary_size
        )
    for name in DTYPES.keys() & inputs.keys():
        if inputs[name] is not None:
            inputs[name] = ops.cast(inputs[name], DTYPES[name])
    return inputs


def prompt_batch(inputs, image_size, text_config):
    """Validate the arrays given to `generate`, and convert them to NumPy.

    Args:
        inputs: dict of arrays, as `generate` takes it without a preprocessor.
        image_size: int, the model's.
        text_config: `TextDecoderConfig`.

    Returns:
        arrays: dict of `token_ids` int32, `padding_mask` and `response_mask`
            bool, all (B, T), and float32 `images` or `image_embeddings`. A
            missing response mask becomes all False: no answer has begun.
        single: bool, `inputs` was one row without a batch axis.

    Raises:
        ValueError: if names, shapes, dtypes or values are invalid.
    """
    given = {key: value for key, value in inputs.items() if value is not None}
    # An image under a misspelt name would be silently ignored.
    unknown = given.keys() - set(PROMPT_ARRAYS)
    if unknown or not {"token_ids", "padding_mask"} <= given.keys():
        raise ValueError(
            "These are not the arrays of a prompt. Expected: 'token_ids' and "
            "'padding_mask', with 'images' or 'image_embeddings' where there "
            "are any, and 'response_mask' where answers have begun. "
            f"Received: {list(inputs)}. `preprocessor.generate_preprocess` "
            "makes them from text, which a model without a preprocessor does "
            "not read."
        )
    ids = to_ids(given["token_ids"], "token_ids", text_config.vocabulary_size)
    if ids.ndim not in (1, 2) or not ids.size:
        raise ValueError(
            "`token_ids` has an unknown shape. Expected: (batch, tokens), or "
            f"(tokens,) of one prompt. Received: {ids.shape}."
        )
    single = ids.ndim == 1
    none = np.zeros(ids.shape, bool)
    arrays = {
        "token_ids": ids,
        "padding_mask": _mask(given["padding_mask"], "padding_mask", ids),
        "response_mask": _mask(
            given.get("response_mask", none), "response_mask", ids
        ),
    }
    pictures = given.keys() & {"images", "image_embeddings"}
    arrays |= {name: to_numpy(given[name]) for name in pictures}
    if single:
        arrays = {name: array[None] for name, array in arrays.items()}
    if "images" in arrays:
        check_images(arrays["images"], image_size)
    for name in pictures:
        arrays[name] = _floats(arrays[name], name, len(arrays["token_ids"]))
    embeddings = arrays.get("image_embeddings")
    width = text_config.hidden_dim
    if embeddings is not None and embeddings.shape[2:] != (width,):
        raise ValueError(
            "`image_embeddings` has an unknown shape. Expected: (batch, image "
            f"tokens, {width}), as `encode_images` gives them. Received: "
            f"{embeddings.shape}."
        )
    return arrays, single


def _mask(mask, name, ids):
    """Return a mask of token ids as bool."""
    mask = to_numpy(mask)
    is_mask = mask.dtype == bool or (
        is_numeric(mask) and ((mask == 0) | (mask == 1)).all()
    )
    if mask.shape != ids.shape or not is_mask:
        raise ValueError(
            f"`{name}` does not match the token ids. Expected: True or False "
            f"for each, shape {ids.shape}. Received: shape {mask.shape}, "
            f"dtype {mask.dtype}, values such as {np.unique(mask)[-3:]}."
        )
    return mask.astype(bool)


def _floats(array, name, rows):
    """Return images or their embeddings as float32."""
    if not is_numeric(array) or array.shape[0] != rows:
        raise ValueError(
            f"`{name}` does not match the prompts. Expected: floats of "
            f"{rows} rows, as many as `token_ids` has. Received: shape "
            f"{array.shape}, dtype {array.dtype}."
        )
    array = array.astype("float32")
    bad = ~np.isfinite(array).reshape(rows, -1).all(axis=1)
    if bad.any():
        raise ValueError(
            f"`{name}` holds NaN or infinity. Expected: numbers. Received: "
            f"{int(bad.sum())} such rows of {rows}, the first at index "
            f"{int(bad.argmax())}."
        )
    return array


def check_targets(inputs, y):
    """Raise on KerasHub's targets: all tokens, shifted by one.

    Targets here are the response: the last columns of the token ids.
    """
    tokens = inputs["token_ids"].shape[-1]
    if y is not None and y.shape[-1] >= tokens:
        raise ValueError(
            "Targets are the response part of the token ids, not all tokens "
            f"shifted by one as in KerasHub. Received: y of {y.shape[-1]} "
            f"columns for {tokens} tokens. Expected: token_ids[:, "
            "-response_length:], as PaliGemmaCausalLMPreprocessor gives them."
        )


def check_compiled(model, method):
    """Raise on a model without optimizer, loss and sampler.

    Args:
        model: `PaliGemmaCausalLM`.
        method: str, name of the method that was called.
    """
    if not model.compiled:
        raise ValueError(
            f"You must call `compile()` before `{method}()`. Received: a "
            "model that was made with `compile=False`."
        )
