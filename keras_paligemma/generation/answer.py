"""The value that `generate(details=True)` returns."""

from dataclasses import dataclass
from dataclasses import field
from typing import Literal
from typing import TypeAlias

import numpy as np

Finish: TypeAlias = Literal["stop_token", "stop_string", "length"]


@dataclass(frozen=True)
class Alternative:
    """A candidate token at a position.

    Args:
        token_id: int.
        text: str, of this token alone.
        log_probability: float, natural logarithm.
    """

    token_id: int
    text: str
    log_probability: float


@dataclass(frozen=True)
class Answer:
    """An answer with its tokens and their log-probabilities.

    Args:
        text: str, without its stop; "" for a model without preprocessor.
        token_ids: ints, including the given start of the answer and the stop
            token.
        log_probabilities: floats, for each token the natural logarithm of its
            probability given the tokens before it, at temperature 1 and
            regardless of banned tokens; 0 on tokens that were given.
        finish: "stop_token", "stop_string", or "length" if `max_new_tokens`
            was reached.
        alternatives: a tuple of `Alternative` for each token, the likeliest
            first, if they were requested.
        beams: tuple of the answers of a beam search, the best first; fewer
            than its width if it has ended before more of them did.
        score: float that beams are ranked by; `None` without a beam search.
        hidden_states: float32 array (tokens, D), after the final norm, that
            each token was chosen from, if they were requested.

    Example:
        >>> answer = Answer("cat", (7, 1), (-0.5, -0.25), "stop_token")
        >>> answer.log_probability
        -0.75
        >>> answer.mean_log_probability
        -0.375
    """

    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Finish
    alternatives: tuple[tuple[Alternative, ...], ...] = ()
    beams: tuple["Answer", ...] = ()
    score: float | None = None
    hidden_states: np.ndarray | None = field(
        default=None, repr=False, compare=False
    )

    @property
    def log_probability(self) -> float:
        """The logarithm of the whole answer's probability."""
        return sum(self.log_probabilities)

    @property
    def mean_log_probability(self) -> float:
        """The mean per token, comparable between answers of any length."""
        return self.log_probability / max(len(self.log_probabilities), 1)
