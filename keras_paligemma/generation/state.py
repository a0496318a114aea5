"""The state that the decoding loop carries from token to token."""

from typing import Any
from typing import NamedTuple


class State(NamedTuple):
    """The answers so far: B rows of R positions, all at the same position.

    A named tuple, since JAX, TensorFlow and Torch can all carry one through a
    loop, and it is immutable. Logits hooks read it.

    Fields:
        ids_BR: int32 (B, R), the tokens so far; 0 at later positions and after
            a row's end.
        log_probabilities_BR: float32 (B, R), natural logarithm of the model's
            probability of each token, at temperature 1 and regardless of
            banned tokens. 0 on given tokens.
        finished_B: bool (B,), rows that need no more tokens.
        node_B: int32 (B,), each row's node in its constraint; see
            `generation.constraints`.
        position: int32 (), how many of the R positions are decided.
        cache: nest of arrays with B first: keys and values of all tokens but
            the last, and validity and rotary positions of the prompt.
        sampler: list of tensors, the variables of a sampler of KerasHub.
        alternatives: empty, or a pair of int32 ids and float32
            log-probabilities, both (B, R, K): the K likeliest at each place.
        hidden_states: empty, or a tuple of one float32 (B, R, D): those that
            each token was chosen from.
    """

    ids_BR: Any
    log_probabilities_BR: Any
    finished_B: Any
    node_B: Any
    position: Any
    cache: Any
    sampler: Any
    alternatives: tuple = ()
    hidden_states: tuple = ()
