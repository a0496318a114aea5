"""Constraints from regular expressions, compiled by `outlines_core`."""

import functools

import numpy as np

# protobuf makes the class at run time, where a type checker does not see it.
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]


def matches_of(automaton, pattern, tokenizer, stops):
    """Restrict an answer to the matches of a pattern; return its start node.

    Args:
        automaton: `Automaton`.
        pattern: str, a regular expression in the syntax of Rust's crate
            `regex`, without look-around and back-references.
        tokenizer: `PaliGemmaTokenizer`.
        stops: tuple of ints that end an answer.

    Raises:
        ValueError: the pattern is not valid, or the vocabulary cannot spell
            any match.
    """
    start, finals, edges = _compiled(pattern, tokenizer.proto)
    nodes = {state: automaton.add_node() for state in edges}
    for state, leads in edges.items():
        for tokens, following in leads.items():
            automaton.add_path(nodes[state], [tokens], end=nodes[following])
    end = automaton.add_node()
    for state in finals:
        automaton.add_path(nodes[state], [tuple(stops)], end=end)
    return nodes[start]


@functools.lru_cache(maxsize=16)
def _compiled(pattern, proto):
    """Compile a pattern for a tokenizer.

    Args:
        pattern: str.
        proto: bytes, a serialized SentencePiece model.

    Returns:
        int, the start state; set of the states where an answer may end; dict
        of each state to a dict of tuples of tokens to the state they lead to.
    """
    try:
        from outlines_core import Index
    except ImportError as error:
        raise ImportError(
            "`regex` needs outlines_core. Expected: pip install "
            '"keras_paligemma[regex]".'
        ) from error
    vocabulary, before, after = _vocabulary(proto)
    try:
        # By itself, since its parentheses could close those around it below.
        Index(pattern, _every_byte())
        # An index does not go on behind the first match, nor through the bytes
        # between a match and a longer one: `\z` leaves one, at the end. What
        # begins with it has no index, so that a newline stands before it.
        index = Index(rf"\n(?:{pattern})\z", vocabulary)
    except ValueError as error:
        raise ValueError(
            "The pattern cannot be compiled for this vocabulary. Expected: a "
            "regular expression without look-around and back-references. "
            f"Received: regex={pattern!r} ({error})."
        ) from error
    finals = index.get_final_states()
    transitions = {state: {} for state in finals} | index.get_transitions()
    start = transitions.pop(index.get_initial_state())[before]
    for leads in transitions.values():
        for token in (before, after):
            leads.pop(token, None)
    edges = {state: {} for state in transitions}
    for tokens in _classes(transitions.values()):
        for state, leads in transitions.items():
            if tokens[0] in leads:
                edges[state][tokens] = leads[tokens[0]]
    return start, finals, edges


@functools.lru_cache(maxsize=2)
def _vocabulary(proto):
    """Return the pieces as `outlines_core` takes them, and two unused ids.

    The first of them is a newline before each answer, the second its end.
    Pieces that are no text, such as the end token, are left out: the end of
    an answer is an edge of its own.
    """
    from outlines_core import Vocabulary

    kinds = ModelProto.SentencePiece
    ids: dict[bytes, list[int]] = {}
    pieces = ModelProto.FromString(proto).pieces
    for token, piece in enumerate(pieces):
        if piece.type == kinds.BYTE:
            spelt = bytes([int(piece.piece[3:5], 16)])
        elif piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            spelt = piece.piece.replace("▁", " ").encode()
        else:
            continue
        ids.setdefault(spelt, []).append(token)
    before, after = len(pieces), len(pieces) + 1
    ids.setdefault(b"\n", []).append(before)
    return Vocabulary(after, ids), before, after


@functools.cache
def _every_byte():
    """Return a vocabulary that spells all texts."""
    from outlines_core import Vocabulary

    return Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})


def _classes(transitions):
    """Return tuples of tokens that lead to the same state from every state.

    Args:
        transitions: iterable of dicts of tokens to states.
    """
    used = np.unique([token for leads in transitions for token in leads])
    # Refined state by state: the classes so far, and where each token leads.
    classes = np.zeros(len(used), "int64")
    for leads in transitions:
        found = np.full(len(used), -1, "int64")
        places = np.searchsorted(used, list(leads))
        found[places] = list(leads.values())
        _, found = np.unique(found, return_inverse=True)
        classes = classes * len(used) + found
        _, classes = np.unique(classes, return_inverse=True)
    order = np.argsort(classes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
    return [tuple(used[part].tolist()) for part in parts if len(part)]
