"""Beam search as in the original: finished answers beside live beams."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_paligemma.generation.choosing import FORBIDDEN
from keras_paligemma.generation.choosing import likeliest
from keras_paligemma.generation.loop import column
from keras_paligemma.generation.loop import first_hidden
from keras_paligemma.generation.loop import going
from keras_paligemma.generation.loop import hooked
from keras_paligemma.generation.loop import is_stop
from keras_paligemma.generation.loop import next_hidden
from keras_paligemma.generation.loop import next_node
from keras_paligemma.generation.loop import part
from keras_paligemma.generation.loop import put
from keras_paligemma.generation.loop import repeated
from keras_paligemma.generation.loop import restricted
from keras_paligemma.layers.attention import soft_cap

# The score of a missing answer, and a lower bound of all real scores.
NONE_YET = 2 * FORBIDDEN
LEAST_SCORE = -1.0e20


class Beams(NamedTuple):
    """The state of a beam search; N beams per row, the best first.

    Fields:
        ids_BNR: int32 (B, N, R), finished answers, including their stop.
        log_probabilities_BNR: float32 (B, N, R), of their tokens.
        scores_BN: float32 (B, N), for ranking: the sum of log-probabilities
            divided by length ** penalty. As in the original, the first token
            is scored without the soft cap of the logits.
        live: `generation.state.State` of B × N rows, beams still decoded.
        sums_BN: float32 (B, N), sums of their log-probabilities.
    """

    ids_BNR: Any
    log_probabilities_BNR: Any
    scores_BN: Any
    live: Any
    sums_BN: Any


def search(backbone, plan, rows, shared):
    """Search for the likeliest answers of a batch.

    At each position every beam may stop, and then competes with the finished
    answers; the N likeliest continuations without a stop are the next beams.
    A row ends when no live beam can become the best answer any more, or at its
    maximum length. Beams that are live then are answers only at the maximum
    length, behind those that have stopped.

    Args:
        backbone, plan, rows, shared: as `loop.answer` takes them; `shared` has
            `length_penalty`, float32.

    Returns:
        The last `Beams`.

    Source: big_vision `trainers/proj/paligemma/predict_fns.py`, `_beam_decode`.
    """

    def first(rows, shared):
        width = plan.beams
        hidden_BD, live = first_hidden(backbone, plan, rows, shared, width)
        # At first all beams are equal: only the first one counts.
        first_N = ops.arange(width, dtype="int32") == 0
        zeros_BN = by_beam(live.log_probabilities_BR[:, 0], width)
        beams = Beams(
            by_beam(live.ids_BR, width),
            by_beam(live.log_probabilities_BR, width),
            zeros_BN + NONE_YET,
            live,
            zeros_BN + ops.where(first_N, 0.0, FORBIDDEN),
        )
        return _chosen(backbone, plan, rows, shared, hidden_BD, beams)

    def following(rows, shared, beams):
        hidden_BD, live = next_hidden(backbone, beams.live)
        beams = beams._replace(live=live)
        return _chosen(backbone, plan, rows, shared, hidden_BD, beams)

    def is_going(*beams):
        live = Beams(*beams).live
        return going(live, live.ids_BR.shape[1])

    def step(*beams):
        beams = part(plan, "step", following, rows, shared, Beams(*beams))
        return tuple(beams)

    beams = part(plan, "first", first, rows, shared)
    beams = Beams(*ops.while_loop(is_going, step, tuple(beams)))
    return _with_live(rows, shared, beams)


def _chosen(backbone, plan, rows, shared, hidden_BD, beams):
    """Decide the next position of all beams."""
    live, place = beams.live, beams.live.position
    begun_B1 = column(rows["response_mask"], place)[:, None]
    # Beams that keep their order.
    fixed_BN = ops.logical_or(begun_B1, by_beam(live.finished_B, plan.beams))
    log_BV, ranked_BV = _log_probabilities(
        backbone, plan, rows, shared, hidden_BD, live
    )
    ids_V = ops.arange(log_BV.shape[1], dtype="int32")
    is_stop_1V = is_stop(ids_V, shared)[None]
    stops_BV = ops.where(is_stop_1V, ranked_BV, NONE_YET)
    ids_BNR, log_probabilities_BNR, scores_BN = _with_stops(
        rows, shared, beams, stops_BV, log_BV, fixed_BN
    )
    # The alternative: each beam continues.
    going_BV = ops.where(is_stop_1V, FORBIDDEN, ranked_BV)
    parent_B, token_B, sums_BN = _with_tokens(rows, beams, going_BV, fixed_BN)
    each_B = _of(ops.take(log_BV, parent_B, axis=0), token_B)
    each_B = ops.where(ops.reshape(fixed_BN, (-1,)), 0.0, each_B)
    whole_B = place + 1 >= rows["max_new_tokens"]
    decided_B = _is_decided(rows, shared, scores_BN, sums_BN)
    # Beams that are given up before their end are not answers.
    given_up_B = ops.logical_and(decided_B, ops.logical_not(whole_B))
    sums_BN = ops.where(given_up_B[:, None], NONE_YET, sums_BN)
    ended_B = repeated(ops.logical_or(decided_B, whole_B), plan.beams)
    live = _advanced(shared, live, parent_B, token_B, each_B, ended_B)
    return Beams(ids_BNR, log_probabilities_BNR, scores_BN, live, sums_BN)


def _log_probabilities(backbone, plan, rows, shared, hidden_BD, live):
    """Return the log-probability of each next token, and that for ranking.

    Returns:
        Two float32 tensors (B × N, V): the model's, and the one that beams are
        ranked by, in which hooks and restrictions apply.
    """
    raw_BV = backbone.logits(hidden_BD, capped=False)
    logits_BV = soft_cap(raw_BV, backbone.text_config.final_logit_soft_cap)
    log_BV = ops.log_softmax(logits_BV, axis=-1)
    # The original searches with soft-capped logits, except for the first
    # token; this finds its answers.
    place, width = live.position, plan.beams
    begun_B = ops.sum(ops.cast(rows["response_mask"], "int32"), axis=1)
    is_first_B = repeated(begun_B, width) == place
    ranked_BV = ops.where(is_first_B[:, None], raw_BV, logits_BV)
    ranked_BV = hooked(plan, ranked_BV, live)
    total_B1 = ops.logsumexp(ranked_BV, axis=-1, keepdims=True)
    # What is forbidden still counts: it does not make the rest more probable.
    left_B = repeated(rows["max_new_tokens"], width) - place
    return log_BV, restricted(shared, ranked_BV, live, left_B) - total_B1


def _with_stops(rows, shared, beams, stops_BV, log_BV, fixed_BN):
    """End each beam here with its likeliest stop, and keep the best answers.

    Args:
        stops_BV: float32 tensor, log-probability of each stop for ranking.
        log_BV: float32 tensor, the model's log-probability of each token.
        fixed_BN: bool tensor, beams that may not stop.

    Returns:
        Ids, log-probabilities and scores of the finished answers.
    """
    width, live, place = fixed_BN.shape[1], beams.live, beams.live.position
    stop_B = likeliest(stops_BV)
    stop_BN = by_beam(ops.max(stops_BV, axis=-1), width)
    score_BN = _scores(rows, shared, beams.sums_BN + stop_BN, place + 1)
    score_BN = ops.where(fixed_BN, NONE_YET, score_BN)
    ids_BR = put(live.ids_BR, stop_B, place)
    each_BR = put(live.log_probabilities_BR, _of(log_BV, stop_B), place)

    def beside(old, new):
        return ops.concatenate([old, new], axis=1)

    return _best(
        beside(beams.ids_BNR, by_beam(ids_BR, width)),
        beside(beams.log_probabilities_BNR, by_beam(each_BR, width)),
        beside(beams.scores_BN, score_BN),
        width,
    )


def _with_tokens(rows, beams, going_BV, fixed_BN):
    """Continue the beams by the N likeliest tokens of each row.

    Args:
        going_BV: float32 tensor, log-probability of each token for ranking.
        fixed_BN: bool tensor, beams that keep their order: their next token is
            given, or they have ended.

    Returns:
        parent_B, token_B: int32 (B × N,), the beam that each continues, among
            those of all rows, and by which token.
        sums_BN: float32, the new sums of log-probabilities.
    """
    width, live, place = fixed_BN.shape[1], beams.live, beams.live.position
    vocabulary_size = going_BV.shape[1]
    total_BNV = beams.sums_BN[..., None] + by_beam(going_BV, width)
    sums_BN, flat_BN = ops.top_k(
        ops.reshape(total_BNV, (-1, width * vocabulary_size)), width
    )
    flat_BN = ops.cast(flat_BN, "int32")
    parent_BN = flat_BN // vocabulary_size
    token_BN = flat_BN % vocabulary_size
    # Given tokens have probability 1, and are equal in all beams.
    same_BN = ops.arange(width, dtype="int32")[None] + 0 * parent_BN
    parent_BN = ops.where(fixed_BN, same_BN, parent_BN)
    given_B1, begun_B1 = (
        column(rows[name], place)[:, None]
        for name in ("response_ids", "response_mask")
    )
    token_BN = ops.where(begun_B1, given_B1, token_BN)
    token_BN = ops.where(by_beam(live.finished_B, width), 0, token_BN)
    sums_BN = ops.where(fixed_BN, beams.sums_BN, sums_BN)
    rows_B1 = ops.arange(ops.shape(parent_BN)[0], dtype="int32")[:, None]
    parent_B = ops.reshape(rows_B1 * width + parent_BN, (-1,))
    return parent_B, ops.reshape(token_BN, (-1,)), sums_BN


def _advanced(shared, live, parent_B, token_B, each_B, ended_B):
    """Return the live beams after their next tokens.

    Args:
        parent_B, token_B: as `_with_tokens` returns them.
        each_B: float32 tensor (B × N,), the model's log-probabilities.
        ended_B: bool tensor (B × N,), beams that end here.
    """

    def chosen(nest):
        return keras.tree.map_structure(
            lambda array: ops.take(array, parent_B, axis=0), nest
        )

    place, log_probabilities_BR = live.position, live.log_probabilities_BR
    return live._replace(
        ids_BR=put(chosen(live.ids_BR), token_B, place),
        log_probabilities_BR=put(chosen(log_probabilities_BR), each_B, place),
        finished_B=ops.logical_or(live.finished_B, ended_B),
        node_B=next_node(shared, chosen(live.node_B), token_B, live.finished_B),
        position=place + 1,
        cache=chosen(live.cache),
    )


def by_beam(array, width):
    """Return (B × N, …) as (B, N, …)."""
    return ops.reshape(array, (-1, width, *array.shape[1:]))


def _of(values_BV, token_B):
    """Return each row's value (B,) at its token."""
    return ops.take_along_axis(values_BV, token_B[:, None], axis=1)[:, 0]


def _scores(rows, shared, sums_BN, tokens):
    """Return scores of answers of `tokens` tokens, given tokens excluded."""
    begun_BR = ops.cast(rows["response_mask"], "int32")
    count_B = ops.maximum(tokens - ops.sum(begun_BR, axis=1), 1)
    count_B1 = ops.cast(count_B, "float32")[:, None]
    scores_BN = sums_BN / ops.power(count_B1, shared["length_penalty"])
    return ops.where(sums_BN < LEAST_SCORE, NONE_YET, scores_BN)


def _is_decided(rows, shared, scores_BN, sums_BN):
    """Return which rows have found their best answer, bool (B,).

    Sums never grow, and the longest answer has the largest divisor.
    """
    within_reach_BN = _scores(rows, shared, sums_BN, rows["max_new_tokens"])
    return ops.max(within_reach_BN, axis=1) < ops.max(scores_BN, axis=1)


def _best(ids_BMR, log_probabilities_BMR, scores_BM, width):
    """Return the N answers of the highest scores, the highest first."""
    scores_BN, index_BN = ops.top_k(scores_BM, width)
    index_BN1 = ops.cast(index_BN, "int32")[..., None]
    return (
        ops.take_along_axis(ids_BMR, index_BN1, axis=1),
        ops.take_along_axis(log_probabilities_BMR, index_BN1, axis=1),
        scores_BN,
    )


def _with_live(rows, shared, beams):
    """Append the best live beams where fewer than N have finished.

    They have their maximum length; the sums of others are `NONE_YET`.
    """
    live, width = beams.live, beams.scores_BN.shape[1]
    none_BN = beams.scores_BN < LEAST_SCORE
    # The first empty place is for the first live beam.
    index_BN = ops.cumsum(ops.cast(none_BN, "int32"), axis=1) - 1
    index_BN = ops.maximum(index_BN, 0)

    def filled(answers, beam):
        empty, index = none_BN, index_BN
        if len(answers.shape) == 3:
            empty, index = empty[..., None], index[..., None]
        beam = ops.take_along_axis(beam, index, axis=1)
        return ops.where(empty, beam, answers)

    each_BNR = by_beam(live.log_probabilities_BR, width)
    return beams._replace(
        ids_BNR=filled(beams.ids_BNR, by_beam(live.ids_BR, width)),
        log_probabilities_BNR=filled(beams.log_probabilities_BNR, each_BNR),
        scores_BN=filled(
            beams.scores_BN,
            _scores(rows, shared, beams.sums_BN, live.position),
        ),
    )
