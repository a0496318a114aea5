"""Answer a batch of prompts: from arrays of inputs to `Answer` objects."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.generation.answer import Alternative
from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.answer import Finish
from keras_paligemma.generation.automata import Automaton
from keras_paligemma.generation.automata import objects_of
from keras_paligemma.generation.automata import one_of
from keras_paligemma.generation.beams import LEAST_SCORE
from keras_paligemma.generation.beams import search
from keras_paligemma.generation.loop import OF_PREFILL
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import advance
from keras_paligemma.generation.loop import answer
from keras_paligemma.generation.loop import begin
from keras_paligemma.generation.options import Options
from keras_paligemma.generation.requests import bucket
from keras_paligemma.generation.requests import check_begun
from keras_paligemma.generation.requests import ends_of
from keras_paligemma.generation.requests import filled_up
from keras_paligemma.generation.requests import plan_of
from keras_paligemma.generation.requests import stop_array
from keras_paligemma.generation.texts import cut
from keras_paligemma.generation.texts import settled
from keras_paligemma.models.inputs import prompt_batch
from keras_paligemma.models.inputs import tensors
from keras_paligemma.models.inputs import typed
from keras_paligemma.models.prefixes import continue_rows
from keras_paligemma.preprocessing.inputs import prompt_text
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.preprocessing.prompt_and_response import split_prompt
from keras_paligemma.turns import write_back


@dataclass(frozen=True)
class Asked:
    """A batch of prompts, prepared for the decoding loop.

    Args:
        plan: `Plan`.
        rows: dict of arrays (rows of the bucket, …), see `loop.answer`.
        shared: dict of arrays.
        begun: bool array (B, length), True on the given start of an answer.
        stops: tuple of int or `None`.
        length: int, the longest answer requested, in tokens.
        single: bool, whether the prompt came without a batch axis.
        stop_strings: tuple of str; each ends an answer.
    """

    plan: Plan
    rows: dict
    shared: dict
    begun: np.ndarray
    stops: tuple[int, ...] | None
    length: int
    single: bool
    stop_strings: tuple[str, ...] = ()


def checked(model, options):
    """Return validated `Options` for this model from keyword arguments."""
    options = Options.of(options)
    options.check(model.backbone.vocabulary_size)
    reads = options.stop_strings or options.choices or options.legal_objects
    if model.preprocessor is None and reads:
        raise ValueError(
            "Without a preprocessor the model knows no text. Received: "
            f"stop_strings={options.stop_strings!r}, choices="
            f"{options.choices!r}, legal_objects={options.legal_objects}. "
            "Expected: `stop_token_ids`, or `model.preprocessor`."
        )
    return options


def prepare(
    model, inputs, count, first, max_new_tokens, stops, options, prefix=None
):
    """Convert a user's inputs to arrays padded to a bucket.

    Args:
        model: `PaliGemmaCausalLM`.
        inputs: dict as `generate` takes it.
        count: int, number of examples whose answers are used; the batch keeps
            its size. `None` uses all, padded to their bucket.
        first: int, index of the batch's first example in the whole input.
        max_new_tokens: int or `None`.
        stops: tuple of int or `None`.
        options: `Options`.
        prefix: `Prefix` that the rows continue, or `None`.

    Returns:
        `Asked`.
    """
    preprocessor, backbone = model.preprocessor, model.backbone
    arrays = inputs
    if preprocessor is not None:
        arrays = preprocessor.generate_preprocess(
            inputs, max_new_tokens=max_new_tokens
        )
    arrays, single = prompt_batch(
        arrays, backbone.image_size, backbone.text_config
    )
    arrays = split_prompt(arrays, max_new_tokens)
    if preprocessor is not None:
        check_begun(arrays, preprocessor)
    size, prompt = arrays["prompt_ids"].shape
    length = arrays["response_ids"].shape[1]
    if count is None:
        count, size = size, bucket(size)
        options.check_rows(count)
    # A preprocessor's output already has one length.
    response = bucket(length, 16)
    if preprocessor is None:
        prompt = bucket(prompt, 16)
    elif length <= preprocessor.response_length:
        response = preprocessor.response_length
    shared: dict[str, Any] = {"stop_ids": stop_array(stops)}
    if prefix is not None:
        shared["prefix"] = continue_rows(prefix, inputs, arrays)
    begun = arrays["response_mask"][:count]
    rows = filled_up(arrays, size, prompt, response)
    rows |= {
        "wanted": np.arange(size) < count,
        "max_new_tokens": np.full(size, length, "int32"),
        "start_node": np.zeros(size, "int32"),
    }
    plan = plan_of(options, model.sampler)
    vocabulary_size = backbone.vocabulary_size
    if plan.samples:
        rows |= filled_up(
            options.rows(first, count, plan.copies, vocabulary_size), size, 0, 0
        )
    if len(options.banned_token_ids):
        allowed = np.ones(vocabulary_size, bool)
        allowed[np.asarray(options.banned_token_ids, "int32")] = False
        shared["allowed"] = allowed
    if options.choices or options.legal_objects:
        starts, arrays = _constraint(model, inputs, count, stops, options)
        shared |= arrays
        rows["start_node"][:count] = starts
    if plan.beams:
        shared["length_penalty"] = np.array(options.length_penalty, "float32")
    return Asked(
        plan,
        rows,
        shared,
        begun,
        stops,
        length,
        single,
        tuple(options.stop_strings),
    )


def _constraint(model, inputs, count, stops, options):
    """Return the start node of each row, and the automaton's arrays."""
    if stops is None:
        raise ValueError(
            "A constraint ends by a stop token. Received: no stop_token_ids. "
            "Expected: 'auto', or ids."
        )
    tokenizer = model.preprocessor.tokenizer
    automaton = Automaton(model.backbone.vocabulary_size)
    if options.choices:
        starts = one_of(automaton, options.choices, tokenizer, stops)
        return starts, automaton.arrays()
    if inputs.get("prompts") is None:
        raise ValueError(
            "Labels are read from prompts. Received: arrays, with "
            "legal_objects=True. Expected: 'prompts'."
        )
    prompts, _ = to_strings(inputs["prompts"], "prompts")
    starts = {
        prompt: objects_of(automaton, prompt, tokenizer, stops)
        for prompt in dict.fromkeys(map(prompt_text, prompts))
    }
    rows = [starts[prompt_text(prompt)] for prompt in prompts[:count]]
    return rows, automaton.arrays()


def run(model, asked):
    """Answer a batch; threads take turns at the model.

    Returns:
        Dict of arrays (rows, …), copies or beams of a prompt side by side:
        `ids`, `log_probabilities`, `scores` of beams, and of alternatives.
    """
    if asked.stop_strings:
        # Stop strings are checked between chunks.
        *_, found = chunks(model, asked, 8)
        return found
    with model.turns:
        write_back(model)
        rows, here = rows_to_devices(asked.rows)
        rows = typed(rows, model.backbone.vocabulary_size)
        shared = asked.shared | {"sampler": _variables(asked.plan)}
        found = model.make_generate_function()(
            _answered, asked.plan, *tensors((rows, shared))
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
        Dict of arrays as `run` returns it, and bool `finished` (rows,). The
        first one comes after one token.
    """
    state, found, until = None, None, 1
    try:
        while found is None or _goes_on(found, asked, until - size):
            with model.turns:
                write_back(model)
                state, here = _next_state(model, asked, state, until)
                found = _arrays(state) | {"finished": state.finished_B}
                del found["sampler"]
                found = _to_host(asked, found, here)
            stopped = _has_stop_string(model, asked, found, until)
            if stopped.any():
                found["finished"] = found["finished"] | stopped
                (finished,) = tensors([found["finished"]])
                state = state._replace(finished_B=finished)
            yield found
            until += size
    finally:
        # Only now: the next chunk overwrites the state.
        if state is not None:
            _keep(asked.plan, state.sampler)


def _goes_on(found, asked, decided):
    """Return whether any row still needs tokens after `decided` of them."""
    return not found["finished"].all() and decided < asked.length


def _next_state(model, asked, state, until):
    """Run the next chunk; return the state and this process's rows."""
    programs = model.make_generate_function()
    rows, here = rows_to_devices(asked.rows)
    rows = typed(rows, model.backbone.vocabulary_size)
    if state is None:
        shared = asked.shared | {"sampler": _variables(asked.plan)}
        arguments = tensors((rows, shared))
        return programs(begun_state, asked.plan, *arguments), here
    rows = {
        name: array for name, array in rows.items() if name not in OF_PREFILL
    }
    shared = {
        name: array for name, array in asked.shared.items() if name != "prefix"
    }
    rows, shared, limit = tensors((rows, shared, np.int32(until)))
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


def _has_stop_string(model, asked, found, count):
    """Return which rows hold a stop string in their first `count` tokens."""
    stopped = np.zeros(len(found["ids"]), bool)
    if asked.stop_strings:
        texts = model.preprocessor.generate_postprocess(
            {"token_ids": found["ids"][:, :count]}
        )
        for row, text in enumerate(texts):
            stopped[row] = cut(text, asked.stop_strings) != text
    return stopped


def texts_so_far(model, asked, found):
    """Return the part of each text that later tokens do not change."""
    rows = len(asked.begun)
    texts = model.preprocessor.generate_postprocess(
        {"token_ids": found["ids"][:rows, : asked.length]}
    )
    return [
        cut(text, asked.stop_strings)
        if finished
        else settled(text, asked.stop_strings)
        for text, finished in zip(texts, found["finished"][:rows], strict=True)
    ]


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


def answers_of(model, asked, found):
    """Convert arrays to answers, a list of `copies` for each prompt.

    Args:
        model: `PaliGemmaCausalLM`.
        asked: `Asked`.
        found: dict that `run` returned.

    Returns:
        List of lists of `Answer`.
    """
    width = asked.plan.beams or asked.plan.copies
    begun = np.repeat(asked.begun, width, axis=0)
    rows = len(begun)
    ids = found["ids"][:rows, : asked.length]
    counts, stopped = ends_of(ids, begun, asked.stops)
    texts = [""] * rows
    if model.preprocessor is not None:
        texts = model.preprocessor.generate_postprocess({"token_ids": ids})
    finishes: list[Finish] = [
        "stop_token" if is_stopped else "length" for is_stopped in stopped
    ]
    for row, text in enumerate(texts):
        texts[row] = cut(text, asked.stop_strings)
        if texts[row] != text:
            finishes[row] = "stop_string"
            counts[row] = _tokens_until(model, ids[row], asked.stop_strings)
    answers = [
        Answer(
            texts[row],
            tuple(ids[row, : counts[row]].tolist()),
            tuple(found["log_probabilities"][row, : counts[row]].tolist()),
            finishes[row],
            _alternatives(model, found, row, counts[row]),
            score=float(found["scores"][row]) if "scores" in found else None,
            hidden_states=_hidden_states(found, row, counts[row]),
        )
        for row in range(rows)
    ]
    groups = [answers[first : first + width] for first in range(0, rows, width)]
    if asked.plan.beams:
        return [[_with_beams(group)] for group in groups]
    return groups


def _tokens_until(model, ids, stop_strings):
    """Count the tokens up to the first that completes a stop string."""
    for count in range(1, len(ids) + 1):
        text = model.preprocessor.generate_postprocess(
            {"token_ids": ids[:count]}
        )
        if cut(text, stop_strings) != text:
            break
    return count


def _with_beams(beams):
    """Return the best beam; its `beams` are those that are answers."""
    beams = [beam for beam in beams if beam.score > LEAST_SCORE] or beams[:1]
    return dataclasses.replace(beams[0], beams=tuple(beams))


def _hidden_states(found, row, count):
    """Return the hidden states of a row's tokens, or `None`."""
    if "hidden_states" not in found:
        return None
    return found["hidden_states"][row, :count]


def _alternatives(model, found, row, count):
    """Return the likeliest tokens at each position of a row."""
    if "alternative_ids" not in found:
        return ()

    def text(token):
        if model.preprocessor is None:
            return ""
        return model.preprocessor.tokenizer.id_to_token(token)

    return tuple(
        tuple(
            Alternative(token, text(token), value)
            for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        for ids, values in zip(
            found["alternative_ids"][row, :count],
            found["alternative_log_probabilities"][row, :count],
            strict=True,
        )
    )
