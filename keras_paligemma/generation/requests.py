"""Validate the arguments of `generate`: prompts, stops and samplers."""

import contextlib
import dataclasses

import keras_hub
import numpy as np

from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.options import Options
from keras_paligemma.preprocessing.inputs import to_ids


def stops_of(stop_token_ids, preprocessor, vocabulary_size):
    """Return the ids that end an answer as a tuple, or `None` for none.

    Args:
        stop_token_ids: int, ints, `None`, or "auto": the tokenizer's end
            token. An empty list is the same as `None`.
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
    """Raise on given starts of answers that already contain a stop.

    Text cannot represent the tokens after it.

    Args:
        arrays: dict of `split_prompt`.
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


def check_sampler(sampler, vocabulary_size):
    """Return a valid sampler of KerasHub, from its name or as it is.

    Args:
        sampler: str or `keras_hub.samplers.Sampler`.
        vocabulary_size: int.

    Raises:
        ValueError: if it is neither, or a sampler with its own loop other
            than beam search, which is implemented here.
    """
    samplers = keras_hub.samplers
    found = None
    with contextlib.suppress(ValueError, TypeError):
        found = samplers.get(sampler)
    if found is None or not isinstance(found, samplers.Sampler):
        raise ValueError(
            "Unknown sampler. Expected: 'greedy', 'beam', 'random', 'top_k', "
            "'top_p' or a `keras_hub.samplers.Sampler`. Received: "
            f"{sampler!r}."
        )
    beams = isinstance(found, samplers.BeamSampler)
    if beams and found.return_all_beams:
        raise ValueError(
            "Answers are strings, which have no room for all beams. Received: "
            "BeamSampler(return_all_beams=True). Expected: "
            f"`generate(…, beams={found.num_beams}, details=True)`, whose "
            "answers have `beams`."
        )
    if not beams and type(found).__call__ is not samplers.Sampler.__call__:
        raise ValueError(
            f"`{type(found).__name__}` brings a loop of its own, which does "
            "not know this model's. Expected: 'greedy', 'beam', 'random', "
            "'top_k', 'top_p', or a sampler with a `get_next_token`. "
            f"Received: {sampler!r}."
        )
    Options(**_settings_of(found)).check(vocabulary_size)
    return found


def _settings_of(sampler):
    """Return a sampler's settings as options of `generate`."""
    settings = {"temperature": sampler.temperature}
    if isinstance(sampler, keras_hub.samplers.TopKSampler):
        settings["top_k"] = sampler.k
    if isinstance(sampler, keras_hub.samplers.TopPSampler):
        settings |= {"top_p": sampler.p, "top_k": sampler.k}
    return settings


def with_compiled_draws(options, sampler):
    """Return options that draw as the compiled sampler does, if seeded.

    A sampler has its own generator, to which the seed of a call is unknown.

    Args:
        options: `Options`.
        sampler: `keras_hub.samplers.Sampler`, used if no option overrides it.

    Raises:
        ValueError: the sampler is not one of KerasHub's.
    """
    samplers = keras_hub.samplers
    quiet = options.seed is None or options.draws or options.beams
    if quiet or isinstance(
        sampler, samplers.GreedySampler | samplers.BeamSampler
    ):
        return options
    # A user's own may draw in any way.
    if type(sampler) not in (
        samplers.RandomSampler,
        samplers.TopKSampler,
        samplers.TopPSampler,
    ):
        raise ValueError(
            f"`{type(sampler).__name__}` draws by a generator of its own, "
            "which takes no seed of a call. Received: "
            f"seed={options.seed!r}. Expected: a sampler that was created with "
            "a seed, and no `seed` here."
        )
    return dataclasses.replace(options, **_settings_of(sampler))


def plan_of(options, sampler):
    """Return the `Plan` for options and the compiled sampler.

    Args:
        options: `Options`.
        sampler: `keras_hub.samplers.Sampler`, used if no option overrides it.
    """
    samplers = keras_hub.samplers
    beams, chooser, draws = options.beams or 0, None, options.draws
    if not draws and not beams:
        greedy = type(sampler) is samplers.GreedySampler
        if (options.num_samples or options.best_of) and (
            greedy or isinstance(sampler, samplers.BeamSampler)
        ):
            draws = True  # Greedy copies would all be equal.
        elif isinstance(sampler, samplers.BeamSampler):
            beams = sampler.num_beams
            options.check_beams(beams)
        elif not greedy:
            # At temperature 0 the sampler would divide by zero.
            chooser = sampler if sampler.temperature else None
    if options.temperature is not None:
        draws = bool(np.any(np.asarray(options.temperature) != 0))
    return Plan(
        samples=draws,
        sampler=chooser,
        copies=options.copies,
        beams=beams,
        hooks=options.hooks,
        alternatives=options.alternatives,
        hidden_states=options.hidden_states,
        cache_dtype=options.cache_dtype,
    )


def bucket(count, least=1):
    """Return the power of two that a count is padded to.

    Programs are compiled for these sizes, so that similar numbers of prompts
    or tokens share a program.

    Example:
        >>> bucket(5), bucket(8), bucket(3, least=16)
        (8, 8, 16)
    """
    return max(least, 1 << (count - 1).bit_length())


def filled_up(arrays, rows, prompt, response):
    """Pad a batch to the sizes of its bucket.

    Args:
        arrays: dict of arrays of `split_prompt`.
        rows: int, at least the number of rows; the last one is repeated.
        prompt: int, prompt tokens to pad to, on the left.
        response: int, response tokens to pad to.
    """

    def padded(name, array):
        width = array.shape[1] if array.ndim > 1 else 0
        before = after = 0
        if name in ("prompt_ids", "prompt_mask"):
            before = prompt - width
        if name in ("response_ids", "response_mask"):
            after = response - width
        if before or after:
            array = np.pad(array, ((0, 0), (before, after)))
        if more := rows - len(array):
            array = np.concatenate([array, np.repeat(array[-1:], more, 0)])
        return array

    return {name: padded(name, array) for name, array in arrays.items()}


def stop_array(stop_token_ids):
    """Return stops as an int32 array, padded to a bucket with -1.

    Args:
        stop_token_ids: tuple of ints, or `None`.
    """
    ids = list(stop_token_ids or ())
    return np.array(ids + [-1] * (bucket(len(ids), 8) - len(ids)), "int32")
