"""The decoding loop: prefill, then one token per row until all have ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from keras_paligemma.generation.choosing import FORBIDDEN
from keras_paligemma.generation.choosing import by_sampler
from keras_paligemma.generation.choosing import likeliest
from keras_paligemma.generation.choosing import sampled
from keras_paligemma.generation.constraints import follow
from keras_paligemma.generation.constraints import legal
from keras_paligemma.generation.prefill import READ
from keras_paligemma.generation.prefill import decode
from keras_paligemma.generation.prefill import prefill
from keras_paligemma.generation.prefill import resume
from keras_paligemma.generation.recording import recorded
from keras_paligemma.generation.state import State

# The entries of a row that only the prefill reads.
OF_PREFILL = (*READ, "prefix_row")


@dataclass(frozen=True)
class Plan:
    """Compile-time parameters of a decoding program; everything else is data.

    Args:
        samples: bool, whether to sample by the options of each row;
            otherwise decoding is greedy.
        sampler: `keras_hub.samplers.Sampler` to use instead, or `None`.
        copies: int, answers per prompt, after one prefill.
        beams: int, width of a beam search; 0 for none.
        hooks: tuple of functions from float32 logits (B, V) and `State` to
            logits, applied in order.
        alternatives: int K, likeliest tokens recorded at each position.
        hidden_states: bool, whether to record them at each position.
        cache_dtype: see `TextDecoder.make_cache`.
    """

    samples: bool = False
    sampler: Any = None
    copies: int = 1
    beams: int = 0
    hooks: tuple[Callable, ...] = ()
    alternatives: int = 0
    hidden_states: bool = False
    cache_dtype: str | None = None

    @property
    def is_pure(self):
        """Whether decoding depends on its tensors alone.

        Hooks and samplers are arbitrary code.
        """
        return self.sampler is None and not self.hooks


def answer(backbone, plan, rows, shared):
    """Answer a batch: one prefill, and a loop until the last row has ended.

    Args:
        backbone: `PaliGemmaBackbone`.
        plan: `Plan`.
        rows: dict of arrays with the batch first: the inputs of `prefill`, or
            `prefix_row`, the row of the prefix that each row continues;
            `response_ids` and `response_mask` (B, R), the given starts of the
            answers and True on them; and the arrays of `row_defaults`.
        shared: dict of arrays without a batch axis: `stop_ids`, int32, tokens
            that end an answer, -1 for none; `sampler`, list of the values of
            its variables; optional are `prefix`, from `Prefix.arrays`,
            `allowed`, bool (V,), and the arrays of `constraints.follow`.

    Returns:
        The last `State`.
    """
    state = begin(backbone, plan, rows, shared)
    return advance(backbone, plan, rows, shared, state)


def begin(backbone, plan, rows, shared):
    """Prefill and choose the first token; return the first `State`."""

    def first(rows, shared):
        hidden_BD, state = first_hidden(
            backbone, plan, rows, shared, plan.copies
        )
        rows = _rows_of_copies(rows, plan.copies)
        return _chosen(backbone, plan, rows, shared, hidden_BD, state)

    return part(plan, "first", first, rows, shared)


def advance(backbone, plan, rows, shared, state, until=None):
    """Continue from a state to the end, or to a position.

    Args:
        until: int32 tensor, number of decided positions; `None` for all.
    """
    responses = state.ids_BR.shape[1]
    rows = _rows_of_copies(rows, plan.copies)
    limit = responses if until is None else ops.minimum(until, responses)

    def following(rows, shared, state):
        hidden_BD, state = next_hidden(backbone, state)
        return _chosen(backbone, plan, rows, shared, hidden_BD, state)

    def step(*state):
        state = part(plan, "step", following, rows, shared, State(*state))
        return tuple(state)

    def is_going(*state):
        return going(State(*state), limit)

    return State(*ops.while_loop(is_going, step, tuple(state)))


def part(plan, name, function, *arguments):
    """Call a part of a program; Torch records it if the plan is pure."""
    if not plan.is_pure:
        return function(*arguments)
    return recorded(name, function, *arguments)


def first_hidden(backbone, plan, rows, shared, copies):
    """Prefill; return hidden states (B, D) and a state without tokens.

    Args:
        copies: int, how often each row is repeated after the prefill.
    """
    responses = rows["response_ids"].shape[1]
    if "prefix" in shared:
        row_B = rows["prefix_row"]
        hidden_BD, cache = resume(
            shared["prefix"], row_B, responses, plan.cache_dtype
        )
    else:
        hidden_B1D, cache = prefill(backbone, rows, responses, plan.cache_dtype)
        hidden_BD = hidden_B1D[:, 0]
    cache, hidden_BD = repeated((cache, hidden_BD), copies)
    ids_BR = ops.zeros_like(repeated(rows["response_ids"], copies))
    zeros_BR = ops.cast(ids_BR, "float32")
    alternatives = hidden_states = ()
    if plan.hidden_states:
        none_B1D = ops.zeros_like(hidden_BD[:, None], dtype="float32")
        hidden_states = (ops.repeat(none_B1D, responses, axis=1),)
    if plan.alternatives:
        shape = (1, 1, plan.alternatives)
        alternatives = tuple(
            ops.tile(array[..., None], shape) for array in (ids_BR, zeros_BR)
        )
    state = State(
        ids_BR,
        zeros_BR,
        ops.logical_not(repeated(rows["wanted"], copies)),
        repeated(rows["start_node"], copies),
        ops.zeros((), "int32"),
        cache,
        list(shared["sampler"]),
        alternatives,
        hidden_states,
    )
    return hidden_BD, state


def next_hidden(backbone, state):
    """Feed the last token back; return hidden states (B, D) and the state."""
    token_B1 = ops.take(
        state.ids_BR, ops.reshape(state.position - 1, (1,)), axis=1
    )
    hidden_BD, cache = decode(
        backbone, token_B1, state.cache, state.position, state.ids_BR.shape[1]
    )
    return hidden_BD, state._replace(cache=cache)


def going(state, limit):
    """Return whether any row needs another token, bool ()."""
    return ops.logical_and(
        state.position < limit, ops.logical_not(ops.all(state.finished_B))
    )


def repeated(tree, copies):
    """Repeat each row of a nest of arrays; copies of a row are adjacent."""
    if copies == 1:
        return tree

    def repeat(array):
        array = ops.repeat(array, copies, axis=0)
        # Torch returns a view for a single row, and a view is not writable.
        is_torch = keras.backend.backend() == "torch"
        return array.contiguous() if is_torch else array

    return keras.tree.map_structure(repeat, tree)


def _rows_of_copies(rows, copies):
    """Repeat each row for its copies; each copy has its own seed."""
    seeds_BC = rows.get("seed")
    before = (*OF_PREFILL, "seed")
    rows = {name: array for name, array in rows.items() if name not in before}
    rows = repeated(rows, copies)
    if seeds_BC is not None:
        rows["seed"] = ops.reshape(seeds_BC, (-1,))
    return rows


def hooked(plan, logits_BV, state):
    """Return logits after the hooks."""
    for hook in plan.hooks:
        logits_BV = hook(logits_BV, state)
    return logits_BV


def restricted(shared, logits_BV, state, left_B):
    """Return logits without banned tokens and what the constraint forbids.

    Args:
        left_B: int32 tensor, how many tokens each answer may still have.
    """
    allowed_V = shared.get("allowed")
    if allowed_V is not None:
        logits_BV = ops.where(allowed_V[None], logits_BV, FORBIDDEN)
    if "next_nodes" in shared:
        allowed_BV = legal(shared, state.node_B, left_B)
        logits_BV = ops.where(allowed_BV, logits_BV, FORBIDDEN)
    return logits_BV


def _chosen(backbone, plan, rows, shared, hidden_BD, state):
    """Choose the token of the next position from its hidden states."""
    place = state.position
    logits_BV = backbone.logits(hidden_BD)
    total_B1 = ops.logsumexp(logits_BV, axis=-1, keepdims=True)
    left_B = rows["max_new_tokens"] - place
    choice_BV = hooked(plan, logits_BV, state)
    choice_BV = restricted(shared, choice_BV, state, left_B)
    variables = state.sampler
    if plan.sampler is not None:
        token_B, variables = by_sampler(plan.sampler, choice_BV, variables)
    elif plan.samples:
        token_B = sampled(choice_BV, rows, place)
    else:
        token_B = likeliest(choice_BV)
    begun_B = column(rows["response_mask"], place)
    token_B = ops.where(begun_B, column(rows["response_ids"], place), token_B)
    token_B = ops.where(state.finished_B, 0, token_B)
    quiet_B = ops.logical_or(begun_B, state.finished_B)
    each_B1 = ops.take_along_axis(logits_BV, token_B[:, None], axis=1)
    each_B = ops.where(quiet_B, 0.0, (each_B1 - total_B1)[:, 0])
    alternatives = state.alternatives
    if alternatives:
        values_BK, ids_BK = ops.top_k(logits_BV, plan.alternatives)
        alternatives = (
            put(alternatives[0], ops.cast(ids_BK, "int32"), place),
            put(alternatives[1], values_BK - total_B1, place),
        )
    hidden_states = state.hidden_states
    if hidden_states:
        hidden_BD = ops.cast(hidden_BD, "float32")
        hidden_states = (put(hidden_states[0], hidden_BD, place),)
    stopped_B = ops.logical_and(
        is_stop(token_B, shared), ops.logical_not(begun_B)
    )
    ended_B = ops.logical_or(stopped_B, place + 1 >= rows["max_new_tokens"])
    return state._replace(
        ids_BR=put(state.ids_BR, token_B, place),
        log_probabilities_BR=put(state.log_probabilities_BR, each_B, place),
        finished_B=ops.logical_or(state.finished_B, ended_B),
        node_B=next_node(shared, state.node_B, token_B, state.finished_B),
        position=place + 1,
        sampler=variables,
        alternatives=alternatives,
        hidden_states=hidden_states,
    )


def next_node(shared, node_B, token_B, finished_B):
    """Return the node of each row after a token; ended rows keep theirs."""
    if "next_nodes" not in shared:
        return node_B
    return ops.where(finished_B, node_B, follow(shared, node_B, token_B))


def is_stop(token_B, shared):
    """Return which tokens end an answer."""
    return ops.any(token_B[:, None] == shared["stop_ids"][None], axis=1)


def put(array_BR, value_B, place):
    """Write one value per row at a position of (B, R, …)."""
    here_R = ops.arange(array_BR.shape[1], dtype="int32") == place
    here = ops.reshape(here_R, (1, -1) + (1,) * (len(value_B.shape) - 1))
    return ops.where(here, value_B[:, None], array_BR)


def column(array_BR, place):
    """Return the values (B,) at a position."""
    return ops.take(array_BR, ops.reshape(place, (1,)), axis=1)[:, 0]


def row_defaults(inputs):
    """Return the row entries that `answer` reads, for greedy decoding.

    Args:
        inputs: dict of `prompt_ids`, `response_ids` and the other inputs of
            `prefill`, with the batch first.

    Returns:
        dict of tensors (B,): bool `wanted`, rows whose answer is used, int32
        `max_new_tokens` and `start_node`.
    """
    zeros_B = ops.zeros_like(inputs["prompt_ids"][:, 0])
    responses = inputs["response_ids"].shape[1]
    return {
        "wanted": zeros_B == 0,
        "max_new_tokens": zeros_B + responses,
        "start_node": zeros_B,
    }
