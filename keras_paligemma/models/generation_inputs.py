"""Prepare a batch of prompts: convert a user's inputs to arrays."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_paligemma.generation.automata import NEVER
from keras_paligemma.generation.automata import Automaton
from keras_paligemma.generation.automata import node_after
from keras_paligemma.generation.automata import objects_of
from keras_paligemma.generation.automata import one_of
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.options import Options
from keras_paligemma.generation.patterns import matches_of
from keras_paligemma.generation.requests import bucket
from keras_paligemma.generation.requests import check_begun
from keras_paligemma.generation.requests import filled_up
from keras_paligemma.generation.requests import plan_of
from keras_paligemma.generation.requests import stop_array
from keras_paligemma.generation.requests import with_compiled_draws
from keras_paligemma.models.inputs import prompt_batch
from keras_paligemma.models.prefixes import continue_rows
from keras_paligemma.preprocessing.inputs import prompt_text
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.preprocessing.prompt_and_response import split_prompt


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
    options = with_compiled_draws(options, model.sampler)
    reads = options.stop_strings or options.is_constrained
    if model.preprocessor is None and reads:
        raise ValueError(
            "Without a preprocessor the model knows no text. Received: "
            f"stop_strings={options.stop_strings!r}, choices="
            f"{options.choices!r}, legal_objects={options.legal_objects}, "
            f"regex={options.regex!r}. "
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
    arrays, single = arrays_of(model, inputs, max_new_tokens)
    shared = {}
    if prefix is not None:
        shared["prefix"] = continue_rows(prefix, inputs, arrays)
    asked = padded(model, arrays, count, first, stops, options)
    if options.is_constrained:
        count = len(asked.begun)
        starts, automaton = _constraint(model, inputs, count, stops, options)
        shared |= automaton
        asked.rows["start_node"][:count] = starts
        _check_possible(model, asked, automaton, options)
    return dataclasses.replace(
        asked, shared=asked.shared | shared, single=single
    )


def arrays_of(model, inputs, max_new_tokens=None):
    """Convert a user's inputs to the arrays of prompts and responses.

    Args:
        model: `PaliGemmaCausalLM`.
        inputs: dict as `generate` takes it.
        max_new_tokens: int or `None`.

    Returns:
        dict of arrays (B, …) of `split_prompt`, and whether the prompt came
        without a batch axis.
    """
    preprocessor, backbone = model.preprocessor, model.backbone
    if preprocessor is not None:
        inputs = preprocessor.generate_preprocess(
            inputs, max_new_tokens=max_new_tokens
        )
    arrays, single = prompt_batch(
        inputs, backbone.image_size, backbone.text_config
    )
    arrays = split_prompt(arrays, max_new_tokens)
    if preprocessor is not None:
        check_begun(arrays, preprocessor)
    return arrays, single


def padded(model, arrays, count, first, stops, options):
    """Pad the arrays of prompts and responses to a bucket.

    Args:
        model: `PaliGemmaCausalLM`.
        arrays: dict, from `arrays_of`.
        count: as in `prepare`.
        first: as in `prepare`.
        stops: as in `prepare`.
        options: `Options`; constraints are added by `prepare`.

    Returns:
        `Asked` of a batch.
    """
    preprocessor = model.preprocessor
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
    begun = arrays["response_mask"][:count]
    rows = filled_up(arrays, size, prompt, response)
    rows |= {
        "wanted": np.arange(size) < count,
        "max_new_tokens": np.full(size, length, "int32"),
        "start_node": np.zeros(size, "int32"),
    }
    plan = plan_of(options, model.sampler)
    vocabulary_size = model.backbone.vocabulary_size
    if plan.samples:
        rows |= filled_up(
            options.rows(first, count, plan.copies, vocabulary_size), size, 0, 0
        )
    if len(options.banned_token_ids):
        allowed = np.ones(vocabulary_size, bool)
        allowed[np.asarray(options.banned_token_ids, "int32")] = False
        shared["allowed"] = allowed
    if plan.beams:
        shared["length_penalty"] = np.array(options.length_penalty, "float32")
    return Asked(
        plan,
        rows,
        shared,
        begun,
        stops,
        length,
        single=False,
        stop_strings=tuple(options.stop_strings),
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
    elif options.regex:
        starts = matches_of(automaton, options.regex, tokenizer, stops)
    else:
        starts = _starts_of_prompts(automaton, inputs, tokenizer, stops)[:count]
    banned = np.asarray(options.banned_token_ids, "int32").tolist()
    return starts, automaton.arrays(banned, stops)


def _starts_of_prompts(automaton, inputs, tokenizer, stops):
    """Restrict each answer to the objects of its prompt; return start nodes."""
    if inputs.get("prompts") is None:
        raise ValueError(
            "Labels are read from prompts. Received: arrays, with "
            "legal_objects=True. Expected: 'prompts'."
        )
    strings, _ = to_strings(inputs["prompts"], "prompts")
    prompts = [prompt_text(string) for string in strings]
    starts = {
        prompt: objects_of(automaton, prompt, tokenizer, stops)
        for prompt in dict.fromkeys(prompts)
    }
    return [starts[prompt] for prompt in prompts]


def _check_possible(model, asked, automaton, options):
    """Raise if no answer to a row meets its constraint.

    A begun list of objects that is too long for `max_new_tokens` is cut, as
    without a constraint.
    """
    for row, begun in enumerate(asked.begun):
        ids = asked.rows["response_ids"][row, : len(begun)][begun]
        node = node_after(automaton, asked.rows["start_node"][row], ids)
        least, left = automaton["ends_in"][node], asked.length - len(ids)
        if node < 0:
            text = model.preprocessor.tokenizer.detokenize(ids)
            reason = f"the begun answer {text!r}, which does not fit"
        elif least == NEVER:
            reason = "banned_token_ids that leave no way to its end"
        elif least > left and not options.legal_objects:
            reason = (
                f"room for {left} tokens, where the shortest answer has {least}"
            )
        else:
            continue
        raise ValueError(
            f"Prompt {row} has no answer that meets the constraint. Received: "
            f"{reason}. Expected: another beginning, fewer banned tokens, or a "
            "larger max_new_tokens."
        )
