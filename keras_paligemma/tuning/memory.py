"""Estimate of a training step's memory by arithmetic."""

import ml_dtypes

from keras_paligemma.tuning.losses import CHUNK_TOKENS

# Weights whose gradients need no backward pass through the vision tower.
_AFTER_BLOCKS = ("vision_encoder/projector/", "vision_encoder/final_norm/")


def estimate_memory(
    backbone,
    batch_size,
    text_length,
    response_length,
    accumulates=False,
    pictures=1,
):
    """Estimate a training step's memory from the shapes alone.

    Weights, gradients and moments are exact; activations are those that
    `remat` saves in the blocks that the backward pass reaches, without the
    effects of a compiler.

    Args:
        backbone: `PaliGemmaBackbone`, with or without values.
        batch_size: int, examples on this device.
        text_length: int, prompt and response tokens.
        response_length: int, response tokens.
        accumulates: bool, whether gradients are accumulated over steps.
        pictures: int, pictures or frames per example.

    Returns:
        dict of str to int, bytes of "weights", "gradients and moments",
        "activations" and "logits".
    """
    weights = backbone.weights_by_name()
    stored = trained = 0
    through_vision = False
    for name, weight in weights.items():
        stored += weight.size * _bytes(weight.dtype)
        if weight.trainable:
            # A gradient in the weight's dtype, two moments in float32, and
            # the sum of gradients.
            floats = 3 if accumulates else 2
            trained += weight.size * (_bytes(weight.dtype) + 4 * floats)
            through_vision |= name.startswith("vision_encoder/") and (
                not name.startswith(_AFTER_BLOCKS)
            )
    compute = _bytes(backbone.compute_dtype)
    vision, text = backbone.vision_config, backbone.text_config
    patches = (backbone.image_size // vision.patch_size) ** 2
    kept = 0
    if through_vision:
        kept += (
            pictures
            * _each(backbone.vision_encoder.blocks)
            * _kept(
                backbone.remat,
                patches,
                vision.hidden_dim,
                vision.hidden_dim,
                vision.hidden_dim,
                2 * vision.intermediate_dim,
                vision.num_heads,
            )
        )
    kept += _each(backbone.text_decoder.blocks) * _kept(
        backbone.remat,
        pictures * patches + text_length,
        text.hidden_dim,
        text.num_query_heads * text.head_dim,
        text.num_key_value_heads * text.head_dim,
        3 * text.intermediate_dim,
        text.num_query_heads,
    )
    tokens = min(batch_size * response_length, CHUNK_TOKENS)
    return {
        "weights": stored,
        "gradients and moments": trained,
        "activations": batch_size * kept * compute,
        # Logits and their gradient, float32.
        "logits": 2 * tokens * text.vocabulary_size * 4,
    }


def _each(stack):
    """Return the number of blocks, or of pairs that are saved as one."""
    return stack.num_layers // (2 if stack.in_pairs else 1)


def _kept(remat, tokens, width, queries, keys, hidden, heads):
    """Return the number of values that a block saves for its backward pass."""
    if remat in ("block", "pair"):
        return tokens * width
    products = tokens * (2 * width + 2 * queries + 2 * keys + hidden)
    if remat == "dots":
        return products
    # Norms, and the attention's logits and weights of each head.
    return products + tokens * (4 * width + 2 * heads * tokens)


def _bytes(dtype):
    return ml_dtypes.finfo(dtype).bits // 8 if "float" in dtype else 1
