"""What `generate(details=True)` gives."""

from dataclasses import dataclass
from typing import Literal
from typing import TypeAlias

Finish: TypeAlias = Literal["stop_token", "stop_string", "length"]


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood at a place.

    Args:
        token_id: int.
        text: str, the token's own.
        log_probability: float, natural logarithm.
    """

    token_id: int
    text: str
    log_probability: float


@dataclass(frozen=True)
class Answer:
    """An answer, and how sure the model was of it.

    Args:
        text: str, without what ended it; of a model without a preprocessor "".
        token_ids: ints, what the answer was given to begin with and the stop
            token included.
        log_probabilities: floats, of each token the natural logarithm of the
            probability that the model gave it after those before it, at
            temperature 1, whatever was banned; 0 on tokens that were given.
        finish: "stop_token", "stop_string", or "length": `max_new_tokens` was
            reached.
        alternatives: a tuple of `Alternative` for each token, the likeliest
            first, where they were asked for.
        beams: tuple of the answers of a beam search, the best first.
        score: float that beams are compared by; else the sum.

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

    @property
    def log_probability(self) -> float:
        """The sum: the logarithm of the whole answer's probability."""
        return sum(self.log_probabilities)

    @property
    def mean_log_probability(self) -> float:
        """The mean a token, which answers of other lengths compare by."""
        return self.log_probability / max(len(self.log_probabilities), 1)
