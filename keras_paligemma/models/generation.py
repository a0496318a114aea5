"""Prefill the cache once, then decode one token a row and step."""

import contextlib

import keras_hub
import numpy as np
from keras import ops

from keras_paligemma.layers.attention import token_positions
from keras_paligemma.models.inputs import full_masks
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.inputs import to_length
from keras_paligemma.preprocessing.layout import LONGEST_RESPONSE


def prefill(backbone, inputs, responses):
    """Run the prompts once, and give what goes on from there.

    Prompts are aligned to the right, so every row writes the cache at the
    same index; rotary positions and masks stay each row's own.

    Args:
        backbone: `PaliGemmaBackbone`.
        inputs: dict as `generate_tokens` takes it.
        responses: int, the longest response, in tokens.

    Returns:
        hidden_BTD: tensor, of image tokens and prompt.
        cache: nest of arrays whose first axis is the batch.
        following: function of a token (B, 1), the cache and the number of
            that token in the response, from 1; gives the logits (B, V) of the
            next one, hidden states (B, D) and the cache.
    """
    embeddings_BTD = backbone.embed(inputs)
    tokens = embeddings_BTD.shape[1]
    prompt_ids = inputs["token_ids"]
    prompt = {
        "padding_mask": inputs["padding_mask"],
        "response_mask": ops.zeros_like(inputs["padding_mask"]),
    }
    valid_BT, response_BT = full_masks(prompt, tokens - prompt_ids.shape[1])
    decoder = backbone.text_decoder
    # The last response token is never fed back.
    layers = decoder.make_cache(
        ops.shape(prompt_ids)[0], tokens + responses - 1
    )
    positions_BT = token_positions(valid_BT)
    hidden_BTD, layers = decoder(
        embeddings_BTD,
        decoder.mask_of(valid_BT, response_BT, 0),
        positions_BT,
        cache=layers,
        index=0,
    )
    # The sampler's cache repeats with its beams, so all that has a row goes in.
    cache = {"layers": layers, "valid": valid_BT, "positions": positions_BT}

    def following(token_B1, cache, step):
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
        hidden_B1D, layers = decoder(
            backbone.token_embedding(token_B1),
            mask_BS[:, None],
            last_B1 + ops.cast(step, last_B1.dtype),
            cache=cache["layers"],
            index=tokens - 1 + step,
            positions_BS=positions_BS,
        )
        hidden_BD = hidden_B1D[:, 0]
        return backbone.logits(hidden_BD), hidden_BD, cache | {"layers": layers}

    return hidden_BTD, cache, following


def generate_tokens(backbone, sampler, inputs, stop_token_ids, model):
    """Continue a batch of prompts by a sampler of KerasHub.

    Args:
        backbone: `PaliGemmaBackbone`.
        sampler: `keras_hub.samplers.Sampler`.
        inputs: dict of `images` (or `image_embeddings`, or neither),
            `token_ids` and `padding_mask` (B, P) of the prompts, and
            `response_ids` and `response_mask` (B, R): what the answers begin
            with, and True where they do.
        stop_token_ids: tuple of ints or `None`; decoding ends when every row
            has produced one of them.
        model: Keras model whose variables the sampler's loop carries.

    Returns:
        Int tensor (B, R): the responses.
    """
    prompt_ids = inputs["token_ids"]
    responses = inputs["response_ids"].shape[1]
    hidden_BTD, cache, step = prefill(backbone, inputs, responses)
    # Slot 0 holds the last prompt token, slot j is cached at tokens - 1 + j.
    ids = ops.concatenate([prompt_ids[:, -1:], inputs["response_ids"]], axis=1)
    begun = ops.cast(inputs["response_mask"], "bool")
    begun = ops.concatenate([ops.ones_like(begun[:, :1]), begun], axis=1)

    def following(ids, cache, index):
        """Give logits for slot `index` from the token before it."""
        token_B1 = ops.take(ids, ops.reshape(index - 1, (1,)), axis=1)
        return step(token_B1, cache, index - 1)

    index = 1
    if type(sampler).__call__ is keras_hub.samplers.Sampler.__call__:
        # The prefill has computed the first token's logits already.
        logits_BV = backbone.logits(hidden_BTD[:, -1])
        first_B = sampler.get_next_token(
            sampler.compute_probabilities(logits_BV)
        )
        first_B = ops.where(
            begun[:, 1], ids[:, 1], ops.cast(first_B, ids.dtype)
        )
        ids = ops.concatenate(
            [ids[:, :1], first_B[:, None], ids[:, 2:]], axis=1
        )
        index = 2
    ids = sampler(
        next=following,
        prompt=ids,
        cache=cache,
        index=index,
        mask=begun,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_BTD,
        model=model,
    )
    return ids[:, 1:]


def split_prompt(arrays, max_new_tokens=None):
    """Split text arrays where the prompts end: at one index for all rows.

    Args:
        arrays: dict of NumPy arrays `token_ids`, `padding_mask`,
            `response_mask` (B, P + R) and what else the backbone takes.
        max_new_tokens: int, length that the response part is cut or filled up
            to; `None` leaves it as it is.

    Returns:
        Dict as `generate_tokens` takes it.

    Raises:
        ValueError: prompts that end at different indices, or no room for an
            answer.
    """
    ids, valid = arrays["token_ids"], arrays["padding_mask"]
    response = arrays["response_mask"]
    prompt = valid & ~response
    ends = {int(row.nonzero()[0][-1]) + 1 if row.any() else 0 for row in prompt}
    if len(ends) != 1 or 0 in ends:
        raise ValueError(
            "Prompts must end at one index in every row: align them to the "
            f"right. Received: prompts ending at {sorted(ends)}. "
            "PaliGemmaCausalLMPreprocessor lays them out so."
        )
    end = ends.pop()
    length = ids.shape[1] - end
    if max_new_tokens is not None:
        length = to_length(
            max_new_tokens, "max_new_tokens", most=LONGEST_RESPONSE
        )
    if not length:
        raise ValueError(
            "The arrays have no room for a response. Received: "
            f"{end} tokens, all of them prompt. Expected: "
            "max_new_tokens, or arrays with a response part."
        )
    if response[:, end + length :].any():
        raise ValueError(
            "A begun answer leaves no room to go on. Expected: at most "
            f"{length} tokens. Received: more. Raise `max_new_tokens`."
        )

    def resized(array):
        more = max(end + length - array.shape[1], 0)
        return np.pad(array, ((0, 0), (0, more)))[:, end : end + length]

    return {
        **arrays,
        "token_ids": ids[:, :end],
        "padding_mask": valid[:, :end],
        "response_ids": resized(ids),
        "response_mask": resized(response),
    }


def drop_after_stop(ids, begun, stop_token_ids):
    """Set what a row produced after its first stop token to padding, 0.

    Args:
        ids: int array (B, R), responses.
        begun: bool array (B, R), True on what they were given to begin with.
            A stop token there ends nothing: the answer goes on behind it.
        stop_token_ids: tuple of ints or `None`.
    """
    if stop_token_ids is None:
        return ids
    stopped = np.cumsum(np.isin(ids, stop_token_ids) & ~begun, axis=1)
    before = np.pad(stopped, ((0, 0), (1, 0)))[:, :-1]
    return np.where(before == 0, ids, 0).astype("int32")


def stops_of(stop_token_ids, preprocessor, vocabulary_size):
    """Give the ids that end an answer as a tuple, or `None` for none.

    Args:
        stop_token_ids: int, ints, `None`, or "auto": the tokenizer's end
            token. None of them is as `None`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`.
        vocabulary_size: int.
    """
    if stop_token_ids is None:
        return None
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if preprocessor is not None:
            return (preprocessor.tokenizer.end_token_id,)
        raise ValueError(
            "Without a preprocessor nobody knows what ends an answer. "
            "Received: stop_token_ids='auto'. Expected: a list of token ids, "
            "or None."
        )
    if isinstance(stop_token_ids, (set, frozenset)):
        stop_token_ids = sorted(stop_token_ids)
    ids = to_ids(stop_token_ids, "stop_token_ids", vocabulary_size)
    return tuple(ids.ravel().tolist()) or None


def check_begun(arrays, preprocessor):
    """Refuse begun answers that have ended: text has no place for the rest.

    Args:
        arrays: dict as `generate_tokens` takes it.
        preprocessor: `PaliGemmaCausalLMPreprocessor`.
    """
    end = preprocessor.tokenizer.end_token_id
    ended = arrays["response_mask"] & (arrays["response_ids"] == end)
    if ended.any():
        row, place = (int(i[0]) for i in ended.nonzero())
        raise ValueError(
            "A begun answer has ended. Expected: `response_mask` True on "
            f"tokens before the end token, {end}. Received: it is token "
            f"{place} of row {row}. Leave it out, and what follows it."
        )


def sampler_of(sampler):
    """Give a sampler of KerasHub by its name, or as it is.

    Args:
        sampler: str or `keras_hub.samplers.Sampler`.

    Raises:
        ValueError: neither.
    """
    found = None
    with contextlib.suppress(ValueError, TypeError):
        found = keras_hub.samplers.get(sampler)
    if not isinstance(found, keras_hub.samplers.Sampler):
        raise ValueError(
            "Unknown sampler. Expected: 'greedy', 'beam', 'random', 'top_k', "
            "'top_p' or a `keras_hub.samplers.Sampler`. Received: "
            f"{sampler!r}."
        )
    return found
