"""The methods of `PaliGemmaCausalLM` that answer."""

import dataclasses
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.data.batches import in_batches
from keras_paligemma.generation.answer import Alternative
from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.beams import LEAST_SCORE
from keras_paligemma.generation.beams import search
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import answer
from keras_paligemma.generation.loop import row_defaults
from keras_paligemma.generation.options import Options
from keras_paligemma.generation.programs import Programs
from keras_paligemma.generation.requests import bucket
from keras_paligemma.generation.requests import check_begun
from keras_paligemma.generation.requests import ends_of
from keras_paligemma.generation.requests import filled_up
from keras_paligemma.generation.requests import plan_of
from keras_paligemma.generation.requests import split_prompt
from keras_paligemma.generation.requests import stop_array
from keras_paligemma.generation.requests import stops_of
from keras_paligemma.models.inputs import prompt_batch
from keras_paligemma.models.inputs import typed
from keras_paligemma.preprocessing.inputs import check_dictionary
from keras_paligemma.preprocessing.inputs import prompt_text
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.turns import write_back


def generate(
    self,
    inputs,
    max_new_tokens=None,
    stop_token_ids="auto",
    strip_prompt=True,
    *,
    details=False,
    batch_size=None,
    max_length=None,
    **options,
):
    """Answer prompts about pictures.

    Threads take turns, so that an answer is computed with one adapter and one
    step's weights; beside a `fit` of another thread it comes between two
    steps. Batches are filled up to powers of two and answers to a bucket of
    lengths: another number of prompts below it, another length, other stops,
    temperatures and seeds compile nothing again.

    Args:
        inputs: dict of `images` and `prompts`: one picture and one string, or
            lists of them; `responses` may hold what the answers begin with. It
            is not changed. Without a preprocessor: arrays, as
            `preprocessor.generate_preprocess` makes them.
        max_new_tokens: int, the longest answer, a begun one included; the
            preprocessor's `response_length` if `None`.
        stop_token_ids: int or ints that end an answer; "auto" is the
            tokenizer's end token; `None` never stops early, nor do no ids. In
            what an answer begins with they end nothing.
        strip_prompt: bool; `False` gives prompt, newline and answer, as
            KerasHub does.
        details: bool, give an `Answer` in place of each string, with its
            tokens and their log-probabilities.
        batch_size: int, examples that are answered at a time, for lists that
            do not fit at once: the last batch is filled up. `None` takes all
            at once.
        max_length: `None`; KerasHub's argument, refused with the way out.
        **options: how tokens are chosen, in place of the sampler of
            `compile`: the fields of `keras_paligemma.generation.options.
            Options`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`,
            `num_samples`, `best_of`, `beams` and others.

    Returns:
        A string for one prompt, a list of strings for a list of prompts (with
        `num_samples`, lists of strings in their place); without a preprocessor
        an int32 array (B, max_new_tokens), 0 after the stop token. With
        `details`, an `Answer` in the place of each.

    Raises:
        ValueError: inputs or options that mean nothing.

    Example:

    ```python
    model.generate({"images": [cat, dog], "prompts": ["cap en", "ocr"]})
    ```
    """
    self._check_compiled("generate")
    if max_length is not None:
        raise ValueError(
            "`generate` has no `max_length`, which in KerasHub counts "
            "prompt and answer together. Expected: `max_new_tokens`, the "
            f"tokens of the answer. Received: max_length={max_length!r}."
        )
    check_dictionary(inputs)
    parts = [(inputs, None)]
    if batch_size is not None:
        parts = in_batches(inputs, batch_size) or parts
    options = Options.of(options)
    options.check(self.backbone.vocabulary_size)
    stops = stops_of(
        stop_token_ids, self.preprocessor, self.backbone.vocabulary_size
    )
    if self.preprocessor is not None and not strip_prompt:
        _check_has_prompts(inputs)
    options = options.seeded()
    rows, first = [], 0
    for part, count in parts:
        asked = prepare(
            self, part, count, first, max_new_tokens, stops, options
        )
        rows += answers_of(self, asked, run(self, asked))
        first = len(rows)
    if not strip_prompt and self.preprocessor is not None:
        rows = _with_prompts(rows, inputs["prompts"])
    if options.best_of:
        rows = [[max(row, key=lambda one: one.log_probability)] for row in rows]
    if not details and self.preprocessor is None:
        found = _as_array(rows, asked.length)
    else:
        found = [[one if details else one.text for one in row] for row in rows]
    if options.num_samples is None:
        found = (
            found[:, 0]
            if isinstance(found, np.ndarray)
            else [row[0] for row in found]
        )
    return found[0] if asked.single else found


def generate_step(self, inputs, stop_token_ids=None):
    """Answer with the likeliest tokens, as a function that can be compiled.

    Args:
        inputs: dict of tensors, as `split_prompt` makes them.
        stop_token_ids: tuple of ints or `None`.

    Returns:
        Dict of `token_ids` int32 and `log_probabilities` float32, both (B, R),
        0 behind the stop.
    """
    rows = row_defaults(inputs) | inputs
    shared = {"stop_ids": stop_array(stop_token_ids), "sampler": []}
    state = answer(self.backbone, Plan(), rows, shared)
    return {
        "token_ids": state.ids_BR,
        "log_probabilities": state.log_probabilities_BR,
    }


def make_generate_function(self):
    """Give the compiled functions of answering, made on the first call.

    Returns:
        `keras_paligemma.generation.programs.Programs`.
    """
    if self.generate_function is None:
        self.generate_function = Programs(self)
    return self.generate_function


@dataclass(frozen=True)
class Asked:
    """A batch of prompts as the loop takes it.

    Args:
        plan: `Plan`.
        rows: dict of arrays (rows of the bucket, …), see `loop.answer`.
        shared: dict of arrays.
        begun: bool array (B, length), what answers were given to begin with.
        stops: tuple of ints or `None`.
        length: int, the longest answer that was asked for.
        single: bool, the prompt came without a batch.
    """

    plan: Plan
    rows: dict
    shared: dict
    begun: np.ndarray
    stops: tuple[int, ...] | None
    length: int
    single: bool


def prepare(model, inputs, count, first, max_new_tokens, stops, options):
    """Read what a user asks into arrays of a bucket.

    Args:
        model: `PaliGemmaCausalLM`.
        inputs: dict as `generate` takes it.
        count: int, how many of the examples someone waits for: the batch keeps
            its size. `None` for all, filled up to their bucket.
        first: int, the number of the first example among all.
        max_new_tokens: int or `None`.
        stops: tuple of ints or `None`.
        options: `Options`.

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
    size, prompt = arrays["token_ids"].shape
    length = arrays["response_ids"].shape[1]
    if count is None:
        count, size = size, bucket(size)
        options.check_rows(count)
    # What a preprocessor lays out has one length already.
    response = bucket(length, 16)
    if preprocessor is None:
        prompt = bucket(prompt, 16)
    elif length <= preprocessor.response_length:
        response = preprocessor.response_length
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
    shared = {"stop_ids": stop_array(stops)}
    if len(options.banned_token_ids):
        allowed = np.ones(vocabulary_size, bool)
        allowed[np.asarray(options.banned_token_ids, "int32")] = False
        shared["allowed"] = allowed
    if plan.beams:
        shared["length_penalty"] = np.array(options.length_penalty, "float32")
    return Asked(plan, rows, shared, begun, stops, length, single)


def run(model, asked):
    """Answer a batch, in turn with other threads.

    Returns:
        Dict of arrays (rows, …), copies or beams of a prompt side by side:
        `ids`, `log_probabilities`, `scores` of beams, and of alternatives.
    """
    with model.turns:
        write_back(model)
        rows, here = rows_to_devices(asked.rows)
        rows = typed(rows, model.backbone.vocabulary_size)
        shared = asked.shared | {"sampler": _variables(asked.plan)}
        found = model.make_generate_function()(
            _answered, asked.plan, *tensors((rows, shared))
        )
        _keep(asked.plan, found.pop("sampler"))
    width = asked.plan.beams or asked.plan.copies
    here = slice(
        here.start and here.start * width, here.stop and here.stop * width
    )
    return {name: to_host(one)[here] for name, one in found.items()}


def _answered(model, plan, rows, shared):
    """What is compiled; a function of the module, so that it is known again.

    The cache is no output: it would be kept until the answer is read.
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
    """Give what of a state is read."""
    found = {
        "ids": state.ids_BR,
        "log_probabilities": state.log_probabilities_BR,
        "sampler": state.sampler,
    }
    if state.alternatives:
        found["alternative_ids"] = state.alternatives[0]
        found["alternative_log_probabilities"] = state.alternatives[1]
    return found


def _in_a_row(array):
    """Give (B, N, …) as (B × N, …)."""
    return ops.reshape(array, (-1, *array.shape[2:]))


def tensors(nest):
    """Give a nest of arrays as tensors, of its own dtypes whatever floatx."""
    return keras.tree.map_structure(
        lambda one: ops.convert_to_tensor(
            one, dtype=keras.backend.standardize_dtype(one.dtype)
        ),
        nest,
    )


def _variables(plan):
    """Give the values of a sampler's variables; generators of seeds."""
    if plan.sampler is None:
        return []
    return [ops.convert_to_tensor(one.value) for one in plan.sampler.variables]


def _keep(plan, values):
    """Give a sampler's variables the values that they had at the end."""
    if plan.sampler is not None:
        for one, value in zip(plan.sampler.variables, values, strict=True):
            one.assign(value)


def answers_of(model, asked, found):
    """Read arrays into answers: a list of `copies` of them for each prompt.

    Args:
        model: `PaliGemmaCausalLM`.
        asked: `Asked`.
        found: dict of `run`.

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
    answers = [
        Answer(
            texts[row],
            tuple(ids[row, : counts[row]].tolist()),
            tuple(found["log_probabilities"][row, : counts[row]].tolist()),
            "stop_token" if stopped[row] else "length",
            _alternatives(model, found, row, counts[row]),
            score=float(found["scores"][row]) if "scores" in found else None,
        )
        for row in range(rows)
    ]
    groups = [answers[first : first + width] for first in range(0, rows, width)]
    if asked.plan.beams:
        return [[_with_beams(group)] for group in groups]
    return groups


def _with_beams(beams):
    """Give the best beam, which holds all that are answers."""
    beams = [one for one in beams if one.score > LEAST_SCORE] or beams[:1]
    return dataclasses.replace(beams[0], beams=tuple(beams))


def _alternatives(model, found, row, count):
    """Give the likeliest tokens of each place of a row."""
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


def _as_array(rows, length):
    """Give answers as int32 (prompts, copies, length), 0 behind their ends."""
    array = np.zeros((len(rows), len(rows[0]), length), "int32")
    for row, answers in enumerate(rows):
        for copy, one in enumerate(answers):
            array[row, copy, : len(one.token_ids)] = one.token_ids
    return array


def _check_has_prompts(inputs):
    if inputs.get("prompts") is None:
        raise ValueError(
            "Arrays have no prompt to repeat. Expected: 'prompts' as "
            "text, or strip_prompt=True. Received: "
            f"{list(inputs)}, strip_prompt=False."
        )


def _with_prompts(rows, prompts):
    """Put its prompt and a newline in front of each answer."""
    prompts, _ = to_strings(prompts, "prompts")
    return [
        [
            dataclasses.replace(one, text=f"{prompt_text(prompt)}\n{one.text}")
            for one in row
        ]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
