"""Choose a token of each row from logits."""

import keras
from keras import ops

from keras_paligemma.generation.noise import gumbel
from keras_paligemma.generation.recording import cond

# Below any logit of a model, but finite: a row without a legal token takes
# an arbitrary token instead of NaN.
FORBIDDEN = -1.0e30


def likeliest(logits_BV):
    """Return the likeliest token of each row, int32 (B,)."""
    return ops.cast(ops.argmax(logits_BV, axis=-1), "int32")


def by_sampler(sampler, logits_BV, variables):
    """Sample with a sampler of KerasHub.

    Args:
        sampler: `keras_hub.samplers.Sampler`.
        logits_BV: float32 tensor.
        variables: list of tensors, values of the sampler's variables; a loop
            carries them, since it cannot assign variables.

    Returns:
        int32 tokens (B,), and the new values.
    """
    mapping = list(zip(sampler.variables, variables, strict=True))
    with keras.StatelessScope(state_mapping=mapping) as scope:
        token_B = sampler.get_next_token(
            sampler.compute_probabilities(logits_BV)
        )
    after = [
        scope.get_current_value(variable) for variable in sampler.variables
    ]
    return ops.cast(token_B, "int32"), after


def sampled(logits_BV, options, place):
    """Sample a token of each row by its own options.

    In order: temperature, top-k, top-p of the remaining tokens, min-p. Adding
    Gumbel noise and taking the argmax samples from the softmax; a row's noise
    depends only on its seed and the position, not on the other rows or the
    backend.

    Args:
        logits_BV: float32 tensor.
        options: dict of `temperature`, `top_k`, `top_p`, `min_p` and `seed`,
            (B,), as `row_options` makes them.
        place: int32 tensor, the position in the answers.

    Returns:
        int32 tensor (B,).
    """
    warm_B = options["temperature"] > 0
    # Noise for a whole vocabulary is expensive: greedy batches skip it.
    return cond(
        ops.any(warm_B),
        lambda: ops.where(
            warm_B, _drawn(logits_BV, options, place), likeliest(logits_BV)
        ),
        lambda: likeliest(logits_BV),
    )


def _drawn(logits_BV, options, place):
    """Sample each row as if its temperature were above 0."""
    # Far below any difference of logits, but no logit becomes infinite.
    heat_B = ops.maximum(options["temperature"], 1e-20)
    hot_BV = logits_BV / heat_B[:, None]
    vocabulary_size = logits_BV.shape[-1]
    cuts_B = ops.logical_or(
        options["top_k"] < vocabulary_size, options["top_p"] < 1
    )
    # Sorting the vocabulary takes longer than all else here.
    least_B = cond(
        ops.any(cuts_B),
        lambda: _least_kept(hot_BV, options["top_k"], options["top_p"]),
        lambda: ops.full_like(hot_BV[:, 0], FORBIDDEN),
    )
    # min-p is relative to the probability of the likeliest token.
    share_B = ops.log(ops.maximum(options["min_p"], 1e-30))
    least_B = ops.maximum(least_B, ops.max(hot_BV, axis=-1) + share_B)
    kept_BV = hot_BV >= least_B[:, None]
    noise_BV = gumbel(options["seed"], place, vocabulary_size)
    return likeliest(ops.where(kept_BV, hot_BV + noise_BV, FORBIDDEN))


def _least_kept(hot_BV, top_k_B, top_p_B):
    """Return the least logit that top-k and top-p keep; ties are kept."""
    sorted_BV = -ops.sort(-hot_BV, axis=-1)
    rank_V = ops.arange(hot_BV.shape[-1], dtype="int32")
    among_BV = rank_V[None] < top_k_B[:, None]
    sorted_BV = ops.where(among_BV, sorted_BV, FORBIDDEN)
    share_BV = ops.softmax(sorted_BV, axis=-1)
    before_BV = ops.cumsum(share_BV, axis=-1) - share_BV
    kept_BV = ops.logical_and(among_BV, before_BV < top_p_B[:, None])
    # The likeliest token is always kept, whatever the rounding.
    last_B = ops.maximum(ops.sum(ops.cast(kept_BV, "int32"), axis=-1) - 1, 0)
    return ops.take_along_axis(sorted_BV, last_B[:, None], axis=-1)[:, 0]
