"""What the loop of answering carries from token to token."""

from typing import Any
from typing import NamedTuple


class State(NamedTuple):
    """Answers that are being written; B rows, R places, all of one step.

    A named tuple, since JAX, TensorFlow and Torch all carry one through a
    loop, and nobody can change it. A logits hook reads it.

    Fields:
        ids_BR: int32 (B, R), the tokens so far; 0 where there is none yet, and
            behind a row's end.
        log_probabilities_BR: float32 (B, R), natural logarithm of what the
            model itself gave each token: at temperature 1, whatever was
            banned. 0 on tokens that an answer was given to begin with.
        finished_B: bool (B,), rows that get no more tokens.
        node_B: int32 (B,), where each row is in its constraint; see
            `generation.constraints`.
        position: int32 (), how many of the R places are decided.
        cache: nest of arrays with B first: keys and values of all tokens but
            the last, and what of the prompt is valid, and where.
        sampler: list of tensors, the variables of a sampler of KerasHub.
        alternatives: empty, or a pair of int32 ids and float32
            log-probabilities, both (B, R, K): the K likeliest at each place.
    """

    ids_BR: Any
    log_probabilities_BR: Any
    finished_B: Any
    node_B: Any
    position: Any
    cache: Any
    sampler: Any
    alternatives: tuple = ()
