"""Run the prompts once into a cache, then continue it."""

import math

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.compat import replicas
from keras_paligemma.layers.attention import token_positions
from keras_paligemma.layers.cache import to_int8

# Row entries that a prefill reads.
READ = ("images", "image_embeddings", "prompt_ids", "prompt_mask")
# Tokens that a prefill of a 3b runs at once, where JAX compiles. Larger groups
# are not faster per token and take more memory: 3 GiB for 32 pictures of 448
# pixels. The GPU's number is not measured.
TOKENS_AT_ONCE = {"cpu": 640, "gpu": 4608, "tpu": 2304}
# Width of the MLP of a 3b. A narrower model takes more tokens at once: on a
# CPU, 16 answers of the nano preset take 67 ms instead of 81.
WIDTH = 9216


def prefill(backbone, inputs, responses, cache_dtype=None):
    """Run the prompts once and fill the cache, a group of rows at a time.

    Args:
        backbone, inputs, responses, cache_dtype: as `prefill_group` takes
            them.

    Returns:
        As `prefill_group` returns them, of all rows.
    """
    inputs = {
        name: inputs[name] for name in READ if inputs.get(name) is not None
    }

    def run(rows):
        return prefill_group(backbone, rows, responses, cache_dtype)

    batch, tokens = inputs["prompt_ids"].shape
    # Exported programs take batches and prompts of any size.
    if not (isinstance(batch, int) and isinstance(tokens, int)):
        return run(inputs)
    if "image_embeddings" in inputs:
        tokens += inputs["image_embeddings"].shape[1]
    elif "images" in inputs:
        frames = inputs["images"].shape[1:-3]
        tokens += backbone.image_sequence_length * math.prod(frames)
    # Grouping rows would place each group on a single device.
    device = "" if replicas() > 1 else platform()
    width = backbone.text_config.intermediate_dim
    rows = rows_at_once(batch, tokens, width, device)
    if rows == batch:
        return run(inputs)
    groups = keras.tree.map_structure(
        lambda array: ops.reshape(array, (-1, rows, *array.shape[1:])), inputs
    )
    # The whole cache is carried. Results stacked group by group would not have
    # the layout of the decoding loop and would have to be copied.
    layers = backbone.text_decoder.make_cache(
        batch, tokens + responses - 1, cache_dtype
    )

    def step(layers, first_and_group):
        first, group = first_and_group
        hidden, found = run(group)
        layers = keras.tree.map_structure(
            lambda whole, part: ops.slice_update(
                whole, (first, *[0] * (len(whole.shape) - 1)), part
            ),
            layers,
            found.pop("layers"),
        )
        return layers, (hidden, found)

    firsts = ops.arange(0, batch, rows, dtype="int32")
    layers, found = ops.scan(step, layers, (firsts, groups))
    hidden_B1D, cache = keras.tree.map_structure(
        lambda array: ops.reshape(array, (batch, *array.shape[2:])), found
    )
    return hidden_B1D, cache | {"layers": layers}


def rows_at_once(batch, tokens, width, device):
    """Return the number of rows that are run together, a divisor of the batch.

    Args:
        batch: int, rows.
        tokens: int, tokens per row.
        width: int, of the decoder's MLP.
        device: str, "cpu", "gpu", "tpu", or "" for all rows.
    """
    most = TOKENS_AT_ONCE.get(device)
    if most is None:
        return batch
    most = most * max(1, WIDTH // width)
    return max(
        rows
        for rows in range(1, batch + 1)
        if batch % rows == 0 and (rows == 1 or rows * tokens <= most)
    )


def prefill_group(backbone, inputs, responses, cache_dtype=None):
    """Run prompts at once.

    Prompts are aligned to the right, so every row writes the cache at the
    same index; rotary positions and masks stay each row's own.

    Args:
        backbone: `PaliGemmaBackbone`.
        inputs: dict of `images` (or `image_embeddings`, or neither),
            `prompt_ids` and `prompt_mask` (B, P).
        responses: int R, the longest response, in tokens.
        cache_dtype: see `TextDecoder.make_cache`.

    Returns:
        hidden_B1D: tensor, hidden states of each prompt's last token.
        cache: nest of arrays whose first axis is the batch.
    """
    embeddings_BTD = backbone.embed(
        {**inputs, "token_ids": inputs["prompt_ids"]}
    )
    padding_BP = ops.cast(inputs["prompt_mask"], "bool")
    images = embeddings_BTD.shape[1] - padding_BP.shape[1]
    # Image tokens are always valid, and no token here is response.
    images_BI = ops.ones((ops.shape(padding_BP)[0], images), "bool")
    valid_BT = ops.concatenate([images_BI, padding_BP], axis=1)
    decoder = backbone.text_decoder
    # The last response token is never fed back.
    layers = decoder.make_cache(
        ops.shape(padding_BP)[0],
        valid_BT.shape[1] + responses - 1,
        cache_dtype,
    )
    positions_BT = token_positions(valid_BT)
    hidden_B1D, layers = decoder(
        embeddings_BTD,
        decoder.mask_of(valid_BT, ops.zeros_like(valid_BT), 0),
        positions_BT,
        cache=layers,
        index=0,
        last=1,
    )
    # The cache holds all per-row state: rows are repeated and selected whole.
    cache = {"layers": layers, "valid": valid_BT, "positions": positions_BT}
    return hidden_B1D, cache


def resume(prefix, row_B, responses, cache_dtype=None):
    """Copy rows of a prefix into a cache with room for a response.

    Args:
        prefix: dict of `Prefix.arrays`.
        row_B: int tensor, which row of the prefix each row continues.
        responses: int R, the longest response, in tokens.
        cache_dtype: see `TextDecoder.make_cache`.

    Returns:
        hidden_BD: tensor, from which the head predicts the first token.
        cache: as `prefill` returns it.
    """

    def with_room(array):
        # Tokens come third to last in both forms of the cache.
        room = [(0, 0)] * (len(array.shape) - 3) + [(0, responses - 1)]
        return ops.pad(array, [*room, (0, 0), (0, 0)])

    chosen = keras.tree.map_structure(
        lambda array: ops.take(array, row_B, axis=0), prefix
    )
    hidden_BD = chosen.pop("last")
    layers = chosen["layers"]
    if cache_dtype == "int8":
        layers = keras.tree.map_structure(to_int8, layers)
    layers = keras.tree.map_structure(with_room, layers)
    return hidden_BD, chosen | {"layers": layers}


def continued(backbone, prefix, row_B, response_ids, response_mask):
    """Run whole responses after a prefix.

    Args:
        backbone: `PaliGemmaBackbone`.
        prefix: dict of `Prefix.arrays`.
        row_B: int tensor, which row of the prefix each row continues.
        response_ids: int tensor (B, R), aligned to the left.
        response_mask: bool tensor (B, R).

    Returns:
        Tensor (B, 1 + R, D) of the hidden states of the prefix's last token
        and of the response.
    """
    responses = response_ids.shape[1]
    hidden_BD, cache = resume(prefix, row_B, responses + 1)
    valid_BP, mask_BR = cache["valid"], ops.cast(response_mask, "bool")
    causal_RR = ops.tril(ops.ones((responses, responses), "bool"))
    seen_BRS = ops.concatenate(
        [
            ops.logical_and(valid_BP[:, None], mask_BR[..., None]),
            ops.logical_and(causal_RR[None], mask_BR[:, None]),
        ],
        axis=2,
    )
    positions_BR = cache["positions"][:, -1:] + ops.cumsum(
        ops.cast(mask_BR, "int32"), axis=1
    )
    hidden_BRD, _ = backbone.text_decoder(
        backbone.token_embedding(response_ids),
        seen_BRS,
        positions_BR,
        cache=cache["layers"],
        index=valid_BP.shape[1],
        positions_BS=ops.concatenate(
            [cache["positions"], positions_BR], axis=1
        ),
    )
    return ops.concatenate([hidden_BD[:, None], hidden_BRD], axis=1)


def decode(backbone, token_B1, cache, step, responses):
    """Decode one token per row with the cache.

    Args:
        backbone: `PaliGemmaBackbone`.
        token_B1: int tensor (B, 1).
        cache: from `prefill` or this function.
        step: int tensor, index of that token in the response, from 1.
        responses: int R, as passed to `prefill`.

    Returns:
        hidden_BD: tensor, from which the head predicts the next token.
        cache: the updated cache.
    """
    later_R = ops.arange(1, responses, dtype="int32")
    seen_R = ops.cast(later_R <= step, "bool")
    seen_BR = ops.logical_and(
        ops.ones_like(cache["valid"][:, :1]), seen_R[None]
    )
    mask_BS = ops.concatenate([cache["valid"], seen_BR], axis=1)
    last_B1 = cache["positions"][:, -1:]
    positions_BS = ops.concatenate(
        [cache["positions"], last_B1 + later_R[None]], axis=1
    )
    hidden_B1D, layers = backbone.text_decoder(
        backbone.token_embedding(token_B1),
        mask_BS[:, None],
        last_B1 + ops.cast(step, last_B1.dtype),
        cache=cache["layers"],
        index=cache["valid"].shape[1] - 1 + step,
        positions_BS=positions_BS,
    )
    return hidden_B1D[:, 0], cache | {"layers": layers}
