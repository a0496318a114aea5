"""The methods of `PaliGemmaCausalLM` that generate answers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import answer
from keras_paligemma.generation.loop import row_defaults
from keras_paligemma.generation.programs import Programs
from keras_paligemma.generation.requests import stop_array
from keras_paligemma.generation.requests import stops_of
from keras_paligemma.models.answering import chunks
from keras_paligemma.models.answering import run
from keras_paligemma.models.generation_inputs import checked
from keras_paligemma.models.generation_inputs import prepare
from keras_paligemma.models.generation_outputs import answers_of
from keras_paligemma.models.generation_outputs import texts_so_far
from keras_paligemma.models.inputs import check_compiled
from keras_paligemma.models.passes import parts_of
from keras_paligemma.models.prefixes import unpacked
from keras_paligemma.preprocessing.inputs import prompt_text
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.inputs import to_strings


def generate(
    self,
    inputs,
    max_new_tokens=None,
    stop_token_ids: int | Sequence[int] | str | None = "auto",
    strip_prompt=True,
    *,
    details=False,
    batch_size=None,
    max_length=None,
    **options,
):
    """Answer prompts about pictures.

    Threads take turns, so that an answer is computed with one adapter and the
    weights of one step. If another thread runs `fit`, answers are computed
    between two steps. Batches are padded to powers of two and answers to a
    bucket of lengths. A smaller number of prompts, another length, other stops,
    temperatures and seeds therefore need no recompilation.

    Args:
        inputs: dict of `images` and `prompts`: one image and one string, or
            lists of them; `responses` may hold the start of the answers.
            `image_embeddings` from `encode`, or `prefix` from `prefill`, avoid
            repeated computation. The dict is not modified. Without a
            preprocessor: arrays, as `preprocessor.generate_preprocess`
            returns them.
        max_new_tokens: int, the longest answer, including its given start.
            `None` is the preprocessor's `response_length`.
        stop_token_ids: int or ints that end an answer, and are not part of its
            text; "auto" is the tokenizer's end token; `None` or an empty list
            never stops early. Ids in the given start of an answer do not end
            it.
        strip_prompt: bool; `False` returns prompt, newline and answer, as
            KerasHub does.
        details: bool, whether to return an `Answer` instead of each string,
            with its tokens and their log-probabilities.
        batch_size: int, examples per batch, for lists that do not fit into
            memory at once; the last batch is padded. `None` uses one batch.
        max_length: `None`; KerasHub's argument, rejected with a hint.
        **options: how tokens are chosen, instead of by the sampler of
            `compile`: the fields of `keras_paligemma.generation.options.
            Options`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`,
            `num_samples`, `best_of`, `beams` and others.

    Returns:
        A string for one prompt, a list of strings for a list of prompts (with
        `num_samples`, lists of strings in their place); without a preprocessor
        an int32 array (B, max_new_tokens), 0 after the stop token. With
        `details`, an `Answer` in the place of each.

    Raises:
        ValueError: if inputs or options are invalid.

    Example:

    ```python
    model.generate({"images": [cat, dog], "prompts": ["cap en", "ocr"]})
    ```
    """
    check_compiled(self, "generate")
    if max_length is not None:
        raise ValueError(
            "`generate` has no `max_length`, which in KerasHub counts "
            "prompt and answer together. Expected: `max_new_tokens`, the "
            f"tokens of the answer. Received: max_length={max_length!r}."
        )
    prefix, inputs = unpacked(self, inputs)
    parts = parts_of(inputs, batch_size)
    options = checked(self, options)
    stops = stops_of(
        stop_token_ids, self.preprocessor, self.backbone.vocabulary_size
    )
    repeats_prompt = self.preprocessor is not None and not strip_prompt
    if repeats_prompt:
        _check_has_prompts(inputs)
    options = options.seeded()
    rows, first = [], 0
    if len(parts) > 1:
        options.check_rows(sum(count for _, count in parts))
    for part, count in parts:
        asked = prepare(
            self, part, count, first, max_new_tokens, stops, options, prefix
        )
        rows += answers_of(self, asked, run(self, asked))
        first = len(rows)
    if repeats_prompt:
        rows = _with_prompts(rows, inputs["prompts"])
    if options.best_of:
        rows = [
            [max(row, key=lambda result: result.log_probability)]
            for row in rows
        ]
    if not details and self.preprocessor is None:
        found = _as_array(rows, asked.length)
    else:
        found = [
            [result if details else result.text for result in row]
            for row in rows
        ]
    if options.num_samples is None:
        found = (
            found[:, 0]
            if isinstance(found, np.ndarray)
            else [row[0] for row in found]
        )
    return found[0] if asked.single else found


def stream(
    self,
    inputs,
    max_new_tokens=None,
    stop_token_ids: int | Sequence[int] | str | None = "auto",
    *,
    chunk=4,
    **options,
):
    """Answer prompts and yield the text as it is generated.

    This is the loop of `generate` in chunks: its cache stays in place, so the
    whole takes little longer. Threads take turns at chunks: a step of `fit` in
    another thread may run between two of them.

    Args:
        inputs: as `generate` takes them, all at once.
        max_new_tokens: as in `generate`.
        stop_token_ids: as in `generate`.
        chunk: int, tokens per piece.
        **options: as in `generate`, without beams, `num_samples` and
            `best_of`, whose answers are not known piece by piece.

    Yields:
        The next piece of text, a string that may end within a word; for a list
        of prompts a list of them, "" for a row without new text. Joined they
        are the answer of `generate`.

    Raises:
        ValueError: if the model has no preprocessor or options are invalid,
            raised before the first piece is requested.

    Example:

    ```python
    for piece in model.stream({"images": cat, "prompts": "caption en"}):
        print(piece, end="", flush=True)
    ```
    """
    check_compiled(self, "stream")
    prefix, inputs = unpacked(self, inputs)
    chunk = to_integer(chunk, "chunk")
    if self.preprocessor is None:
        raise ValueError(
            "Without a preprocessor there is no text to stream. Received: a "
            "model of arrays. Expected: `model.preprocessor`, or `generate`."
        )
    asked = prepare(
        self,
        inputs,
        None,
        0,
        max_new_tokens,
        stops_of(
            stop_token_ids, self.preprocessor, self.backbone.vocabulary_size
        ),
        checked(self, options).seeded(),
        prefix,
    )
    if asked.plan.beams or asked.plan.copies > 1:
        raise ValueError(
            "Only one answer a prompt has a first piece. Received: beams, "
            "num_samples or best_of. Expected: `generate`, or a model that is "
            "compiled with another sampler than 'beam'."
        )
    return _pieces(self, asked, chunk)


def _pieces(model, asked, chunk):
    """Yield the new text after each chunk."""
    given = [""] * len(asked.begun)
    for found in chunks(model, asked, chunk):
        texts = texts_so_far(model, asked, found)
        pieces = [
            text[len(before) :]
            for text, before in zip(texts, given, strict=True)
        ]
        given = texts
        if any(pieces):
            yield pieces[0] if asked.single else pieces


def generate_step(self, inputs, stop_token_ids=None, cache_dtype=None):
    """Answer by greedy decoding, as a function that can be compiled.

    Args:
        inputs: dict of tensors, as `split_prompt` makes them.
        stop_token_ids: tuple of ints or `None`.
        cache_dtype: "int8" or `None`, see `Options`.

    Returns:
        dict of `token_ids` int32 and `log_probabilities` float32, both (B, R),
        0 after the stop.
    """
    rows = row_defaults(inputs) | inputs
    shared = {"stop_ids": stop_array(stop_token_ids), "sampler": []}
    state = answer(self.backbone, Plan(cache_dtype=cache_dtype), rows, shared)
    return {
        "token_ids": state.ids_BR,
        "log_probabilities": state.log_probabilities_BR,
    }


def make_generate_function(self):
    """Return the compiled functions of `generate`, created on first use.

    Returns:
        `keras_paligemma.generation.programs.Programs`.
    """
    if self.generate_function is None:
        self.generate_function = Programs(self)
    return self.generate_function


def _as_array(rows, length):
    """Return answers as int32 (prompts, copies, length), 0 after their ends."""
    array = np.zeros((len(rows), len(rows[0]), length), "int32")
    for row, answers in enumerate(rows):
        for copy, result in enumerate(answers):
            array[row, copy, : len(result.token_ids)] = result.token_ids
    return array


def _check_has_prompts(inputs):
    if inputs.get("prompts") is None:
        raise ValueError(
            "Arrays have no prompt to repeat. Expected: 'prompts' as "
            "text, or strip_prompt=True. Received: "
            f"{list(inputs)}, strip_prompt=False."
        )


def _with_prompts(rows, prompts):
    """Prepend its prompt and a newline to each answer and to its beams."""
    prompts, _ = to_strings(prompts, "prompts")

    def behind(prompt, answer):
        return dataclasses.replace(
            answer,
            text=f"{prompt}\n{answer.text}",
            beams=tuple(behind(prompt, beam) for beam in answer.beams),
        )

    return [
        [behind(prompt_text(prompt), answer) for answer in row]
        for prompt, row in zip(prompts, rows, strict=True)
    ]
