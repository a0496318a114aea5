"""The options by which `generate` chooses tokens, and their validation."""

import dataclasses
import difflib
import numbers
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_paligemma.layers.cache import check_cache_dtype
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.inputs import to_integer

# Temperatures and penalties are float32.
LARGEST = float(np.finfo("float32").max)


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `generate` that control decoding.

    Temperature, top-k, top-p, min-p and seed may be lists, one value per
    prompt. Any of the first four turns on sampling; without them the sampler
    that the model was compiled with is used.

    Args:
        temperature: float that logits are divided by; 0 is greedy decoding.
        top_k: int, sample from this many likeliest tokens.
        top_p: float in (0, 1], sample from the likeliest tokens that together
            have this probability.
        min_p: float in [0, 1], sample from tokens of at least this fraction
            of the likeliest token's probability.
        seed: int; the same seed gives the same samples, whatever the batch
            size, and row for row on all backends. `None` draws one from
            NumPy's global generator, which `keras.utils.set_random_seed` seeds.
            With a seed, a compiled sampler of KerasHub's draws by it too.
        num_samples: int n; returns n answers per prompt, sampled at
            temperature 1 unless set otherwise.
        best_of: int n; samples n answers and returns the likeliest.
        banned_token_ids: ints, never chosen. Log-probabilities ignore the
            ban.
        stop_strings: str or strs that end an answer and are cut from it; `None`
            for none. Those in the given start of an answer do not end it.
        beams: int, width of a beam search.
        length_penalty: float; beams are ranked by the sum of log-probabilities
            divided by tokens ** `length_penalty`. 0 ranks by the sum, as in
            the original.
        alternatives: int, number of likeliest tokens to return per position.
        hidden_states: bool, whether to return the hidden states that each
            token is chosen from.
        choices: strs; the answer is one of them. As for `regex`, it is an
            error if none fits `max_new_tokens`, the banned tokens or an answer
            that was begun.
        regex: str; the whole answer matches this regular expression, which
            has no look-around and no back-references. `\\d` and `\\w` are
            digits and letters of all scripts; write `[0-9]`. It needs the
            extra `regex`.
        legal_objects: bool; answers to "detect" and "segment" are restricted
            to objects with labels of their prompt, or none; other prompts are
            unrestricted. An object does not begin if `max_new_tokens` would
            cut it.
        logits_hook: function from float32 logits (B, V) and `State` to
            logits, or a sequence of them, applied in order. It is compiled
            with the loop, so pass the same function each time; an object that
            is called has a hash.
        cache_dtype: "int8" keeps keys and values in int8, with a scale for
            each token and head: half the memory of bfloat16 for a batch that
            does not fit. Answers may differ slightly. `None` keeps the
            compute dtype.
    """

    temperature: float | Sequence[float] | None = None
    top_k: int | Sequence[int] | None = None
    top_p: float | Sequence[float] | None = None
    min_p: float | Sequence[float] | None = None
    seed: int | Sequence[int] | None = None
    num_samples: int | None = None
    best_of: int | None = None
    banned_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] | str | None = ()
    beams: int | None = None
    length_penalty: float = 0.0
    alternatives: int = 0
    hidden_states: bool = False
    choices: Sequence[str] | None = None
    legal_objects: bool = False
    regex: str | None = None
    logits_hook: Callable | Sequence[Callable] = ()
    cache_dtype: str | None = None

    def __post_init__(self):
        stops = self.stop_strings
        if stops is None:
            stops = ()
        elif isinstance(stops, str):
            stops = (stops,)
        object.__setattr__(self, "stop_strings", stops)

    @classmethod
    def of(cls, options):
        """Create options from keyword arguments; unknown ones raise."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"`generate` has no option {name!r}.{hint} Expected: one "
                    f"of {known}. Received: {name}={options[name]!r}."
                )
        return cls(**options)

    @property
    def draws(self):
        """Whether a sampling option is set."""
        drawing = (self.temperature, self.top_k, self.top_p, self.min_p)
        return any(setting is not None for setting in drawing)

    @property
    def copies(self):
        """Number of answers generated per prompt."""
        return self.num_samples or self.best_of or 1

    @property
    def hooks(self):
        """The logits hooks as a tuple."""
        if isinstance(self.logits_hook, (list, tuple)):
            return tuple(self.logits_hook)
        return (self.logits_hook,)

    def check(self, vocabulary_size):
        """Raise on invalid values.

        Args:
            vocabulary_size: int.

        Raises:
            ValueError: names the option.
        """
        _check("temperature", self.temperature, 0, LARGEST, "0 or more")
        _check(
            "top_k",
            self.top_k,
            1,
            vocabulary_size,
            f"an integer, 1 to {vocabulary_size}, the vocabulary's size",
            whole=True,
        )
        _check("top_p", self.top_p, 0, 1, "more than 0, at most 1", above=True)
        _check("min_p", self.min_p, 0, 1, "0 to 1")
        _check("seed", self.seed, 0, 2**31 - 1, "0 to 2³¹ - 1", whole=True)
        # One number for all prompts, and not `None`.
        penalty = [self.length_penalty]
        _check("length_penalty", penalty, 0, LARGEST, "0 or more")
        for name in ("num_samples", "best_of", "beams"):
            if getattr(self, name) is not None:
                to_integer(getattr(self, name), name)
        to_integer(self.alternatives, "alternatives", 0, vocabulary_size)
        banned = to_ids(
            self.banned_token_ids, "banned_token_ids", vocabulary_size
        )
        if banned.ndim != 1:
            raise ValueError(
                "`banned_token_ids` is a list of token ids. Received: "
                f"{self.banned_token_ids!r}."
            )
        for name in ("stop_strings", "choices"):
            self._check_strings(name)
        self._check_constraints()
        if not all(
            callable(hook) and isinstance(hook, Hashable) for hook in self.hooks
        ):
            raise ValueError(
                "A logits hook is a function of logits and state, by whose "
                "hash its program is found. Received: logits_hook="
                f"{self.logits_hook!r}. Expected: a function, or an object "
                "that can be called and hashed."
            )
        check_cache_dtype(self.cache_dtype)
        several = [
            name
            for name in ("num_samples", "best_of", "beams")
            if getattr(self, name) is not None
        ]
        if len(several) > 1 or (self.beams is not None and self.draws):
            raise ValueError(
                "These options exclude each other. Expected: one of "
                "num_samples, best_of and beams, and no temperature, top_k, "
                f"top_p or min_p beside beams. Received: {several}, "
                f"temperature={self.temperature!r}, top_k={self.top_k!r}, "
                f"top_p={self.top_p!r}, min_p={self.min_p!r}."
            )
        if self.beams is not None:
            self.check_beams(self.beams)
        if self.beams is None and self.length_penalty:
            raise ValueError(
                "A length penalty compares beams. Received: length_penalty="
                f"{self.length_penalty!r} without beams. Expected: beams=4, "
                "say."
            )

    def check_beams(self, beams):
        """Raise on options that a beam search cannot follow.

        Args:
            beams: int, of the options or of the compiled sampler.
        """
        if self.stop_strings or self.alternatives or self.hidden_states:
            raise ValueError(
                "Beams are looked at when they have ended. Received: "
                f"beams={beams}, stop_strings={self.stop_strings!r}, "
                f"alternatives={self.alternatives} and hidden_states="
                f"{self.hidden_states}. Expected: beams alone, or one of them "
                "without beams."
            )

    @property
    def is_constrained(self):
        """Whether answers are restricted by an automaton."""
        return bool(self.choices or self.legal_objects or self.regex)

    def _check_constraints(self):
        if self.regex is not None and not (
            isinstance(self.regex, str) and self.regex
        ):
            raise ValueError(
                "`regex` is a pattern that is not empty. Received: "
                f"regex={self.regex!r}."
            )
        given = [self.choices, self.legal_objects or None, self.regex]
        if sum(each is not None for each in given) > 1:
            raise ValueError(
                "Constraints exclude each other. Expected: one of choices, "
                f"legal_objects and regex. Received: choices={self.choices!r}, "
                f"legal_objects={self.legal_objects}, regex={self.regex!r}."
            )

    def _check_strings(self, name):
        given = getattr(self, name)
        if given is None:  # No choices.
            return
        is_list = isinstance(given, (list, tuple))
        if not is_list or not all(isinstance(s, str) and s for s in given):
            raise ValueError(
                f"`{name}` is a list of strings that are not empty. Received: "
                f"{given!r}."
            )
        if name == "choices" and not given:
            raise ValueError("`choices` is empty. Expected: strings.")

    def seeded(self):
        """Return the same options with a seed, drawn if `None`."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=np.random.randint(2**31))

    def rows(self, first, rows, copies, vocabulary_size):
        """Return the options of each row as arrays.

        Args:
            first: int, index of the first prompt in the whole input.
            rows: int, number of prompts.
            copies: int, answers per prompt.
            vocabulary_size: int.

        Returns:
            dict of arrays (rows,): float32 `temperature`, `top_p`, `min_p`,
            int32 `top_k`; and int32 `seed` (rows, copies).
        """

        def each(value, default, dtype):
            if value is None:
                value = default
            value = np.asarray(value)
            if value.ndim:
                value = value[first : first + rows]
            return np.broadcast_to(value.astype(dtype), (rows,))

        seeds = np.asarray(self.seed, "int64")
        if seeds.ndim:
            seeds = seeds[first : first + rows]
        else:
            seeds = prompt_seeds(seeds, np.arange(first, first + rows))
        seeds = copy_seeds(seeds, np.arange(copies))
        return {
            "temperature": each(self.temperature, 1.0, "float32"),
            "top_k": each(self.top_k, vocabulary_size, "int32"),
            "top_p": each(self.top_p, 1.0, "float32"),
            "min_p": each(self.min_p, 0.0, "float32"),
            "seed": (seeds & 0xFFFFFFFF).astype("uint32").view("int32"),
        }

    def check_rows(self, count):
        """Raise on lists whose length is not the number of prompts."""
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(self, name)
            if np.ndim(value) and len(value) != count:
                raise ValueError(
                    f"`{name}` does not match the prompts. Expected: a number, "
                    f"or {count}, one a prompt. Received: {len(value)}."
                )


def prompt_seeds(seed, indices):
    """Return a seed for each prompt, so that equal prompts differ.

    Integers of 32 bits may overflow.

    Args:
        seed: integer scalar, of NumPy or TensorFlow.
        indices: integers (B,), of the prompts in the whole input.

    Returns:
        Integers (B,), 0 to 2³¹ - 1, as a list of seeds has them.
    """
    return (seed * 1_000_003 + indices) & 0x7FFFFFFF


def copy_seeds(seeds, copies):
    """Return a seed for each copy (C,) of each prompt (B,), shape (B, C).

    The lower 32 bits count.
    """
    return seeds[:, None] * 1_000_033 + copies


def _check(name, value, least, most, expected, whole=False, above=False):
    """Raise on numbers outside a range."""
    if value is None:
        return
    kind = numbers.Integral if whole else numbers.Real
    for number in np.atleast_1d(np.asarray(value, object)):
        # NumPy's float16 cannot be compared with large numbers.
        number = number.item() if isinstance(number, np.generic) else number
        good = isinstance(number, kind) and not isinstance(number, bool)
        good = good and least <= number <= most
        if not good or (above and number <= least):
            raise ValueError(
                f"`{name}` is out of range. Expected: {expected}. Received: "
                f"{number!r}."
            )
