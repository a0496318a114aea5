"""Answer a batch of prompts with compiled programs, at once or in chunks."""

import numpy as np
from keras import ops

from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.generation.beams import search
from keras_paligemma.generation.loop import OF_PREFILL
from keras_paligemma.generation.loop import advance
from keras_paligemma.generation.loop import answer
from keras_paligemma.generation.loop import begin
from keras_paligemma.models.generation_outputs import has_stop_string


def run(model, asked):
    """Answer a batch; threads take turns at the model.

    Returns:
        dict of arrays (rows, …), copies or beams of a prompt side by side:
        `ids`, `log_probabilities`, `scores` of beams, and of alternatives.
    """
    if asked.stop_strings:
        # Stop strings are checked between chunks.
        *_, found = chunks(model, asked, 8)
        return found
    with model.turns:
        rows, here = rows_to_devices(asked.rows)
        shared = asked.shared | {"sampler": _variables(asked.plan)}
        found = model.make_generate_function()(
            _answered, asked.plan, rows, shared
        )
        _keep(asked.plan, found.pop("sampler"))
    return _to_host(asked, found, here)


def _to_host(asked, found, here):
    """Return the arrays of the rows that belong to this process."""
    width = asked.plan.beams or asked.plan.copies
    here = slice(
        here.start and here.start * width, here.stop and here.stop * width
    )
    return {name: to_host(array)[here] for name, array in found.items()}


def chunks(model, asked, size):
    """Answer a batch in chunks of tokens.

    Args:
        model: `PaliGemmaCausalLM`.
        asked: `Asked`, without beams.
        size: int, tokens per chunk.

    Yields:
        dict of arrays as `run` returns it, and bool `finished` (rows,). The
        first dict comes after one token.
    """
    state, goes_on, until = None, True, 1
    try:
        while goes_on:
            with model.turns:
                state, here = _next_state(model, asked, state, until)
                found = _arrays(state) | {"finished": state.finished_B}
                del found["sampler"]
                found = _to_host(asked, found, here)
                if asked.stop_strings:
                    finished = found["finished"] | has_stop_string(
                        model, asked, found, until
                    )
                    found["finished"] = finished
                    state = state._replace(finished_B=_placed(finished))
                # Processes go on together, until the last row of all ends.
                goes_on = not to_host(state.finished_B).all()
            yield found
            until += size
    finally:
        # Only at the end: each chunk overwrites the previous state.
        if state is not None:
            _keep(asked.plan, state.sampler)


def _placed(finished):
    """Return which rows have ended, as the program takes it."""
    placed, _ = rows_to_devices({"finished": finished})
    return ops.convert_to_tensor(placed["finished"], "bool")


def _next_state(model, asked, state, until):
    """Run the next chunk; return the state and this process's rows."""
    programs = model.make_generate_function()
    if state is None:
        rows, here = rows_to_devices(asked.rows)
        shared = asked.shared | {"sampler": _variables(asked.plan)}
        return programs(begun_state, asked.plan, rows, shared), here
    # Pictures were read by the first chunk, and are not placed again.
    rows, here = rows_to_devices(
        {
            name: array
            for name, array in asked.rows.items()
            if name not in OF_PREFILL
        }
    )
    shared = {
        name: array for name, array in asked.shared.items() if name != "prefix"
    }
    limit = np.array(until, "int32")
    state = programs(
        later_state, asked.plan, rows, shared, state, limit, donated=2
    )
    return state, here


def begun_state(model, plan, rows, shared):
    """Run the prefill and choose the first token, as one program."""
    return begin(model.backbone, plan, rows, shared)


def later_state(model, plan, rows, shared, state, until):
    """Run one chunk, as a program that overwrites the state."""
    return advance(model.backbone, plan, rows, shared, state, until)


def _answered(model, plan, rows, shared):
    """Answer a batch; at module level, so that its compilation is reused.

    The cache is not an output: it would stay in memory until the answer is
    read.
    """
    if not plan.beams:
        return _arrays(answer(model.backbone, plan, rows, shared))
    beams = search(model.backbone, plan, rows, shared)
    return _arrays(beams.live) | {
        "ids": _in_a_row(beams.ids_BNR),
        "log_probabilities": _in_a_row(beams.log_probabilities_BNR),
        "scores": _in_a_row(beams.scores_BN),
    }


def _arrays(state):
    """Return the arrays of a state that the host reads."""
    found = {
        "ids": state.ids_BR,
        "log_probabilities": state.log_probabilities_BR,
        "sampler": state.sampler,
    }
    if state.alternatives:
        found["alternative_ids"] = state.alternatives[0]
        found["alternative_log_probabilities"] = state.alternatives[1]
    if state.hidden_states:
        found["hidden_states"] = state.hidden_states[0]
    return found


def _in_a_row(array):
    """Return (B, N, …) as (B × N, …)."""
    return ops.reshape(array, (-1, *array.shape[2:]))


def _variables(plan):
    """Return the values of a sampler's variables, such as seeds."""
    if plan.sampler is None:
        return []
    return [
        ops.convert_to_tensor(variable.value)
        for variable in plan.sampler.variables
    ]


def _keep(plan, values):
    """Assign a sampler's variables their values after decoding."""
    if plan.sampler is not None:
        for variable, value in zip(plan.sampler.variables, values, strict=True):
            variable.assign(value)
