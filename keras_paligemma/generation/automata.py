"""Constraints as automata over tokens, built from text, stored as arrays."""

import re

import numpy as np

from keras_paligemma.generation.requests import bucket
from keras_paligemma.preprocessing.texts import plain_rows

# More tokens than any answer has.
NEVER = 2**30


class Automaton:
    """A token automaton for a batch; each row has its own start node.

    A node is a dict from sets of tokens to the node they lead to. Two
    different sets are disjoint.

    Args:
        vocabulary_size: int.

    Example:
        >>> automaton = Automaton(8)
        >>> start = automaton.add_node()
        >>> end = automaton.add_path(start, [(3,), (4, 5)])
        >>> arrays = automaton.arrays()
        >>> arrays["next_nodes"][start, arrays["token_classes"]].tolist()
        [-1, -1, -1, 1, -1, -1, -1, -1]
    """

    def __init__(self, vocabulary_size):
        self.vocabulary_size = vocabulary_size
        self._nodes = []
        self._free = []

    def add_node(self):
        """Add a node without outgoing edges and return its number."""
        self._nodes.append({})
        return len(self._nodes) - 1

    def add_free_node(self):
        """Add a node that every token leads back to."""
        self._free.append(self.add_node())
        return self._free[-1]

    def add_path(self, node, path, end=None):
        """Add a path of token sets and return its last node.

        Args:
            node: int, where the path begins. A common beginning
                with an existing path is shared.
            path: list of tuples of int.
            end: int, the last node; a new one if `None`.
        """
        for place, tokens in enumerate(path):
            is_last = place == len(path) - 1
            if is_last and end is not None:
                self._nodes[node][tokens] = end
            elif tokens not in self._nodes[node]:
                # Before the assignment below, since this appends to `_nodes`.
                following = self.add_node()
                self._nodes[node][tokens] = following
            node = self._nodes[node][tokens]
        return node

    def arrays(self, banned=(), stops=()):
        """Return the arrays that `constraints.legal` reads.

        The dimensions of `next_nodes` are padded to powers of two, so that
        constraints of similar size share a compiled program.

        Args:
            banned: ints, tokens that lead nowhere.
            stops: ints, tokens that end an answer.

        Returns:
            dict of `token_classes`, `next_nodes` and `ends_in`.

        Raises:
            ValueError: an answer goes on behind a stop, or two different sets
                of tokens overlap.
        """
        banned, stops = set(banned), set(stops)
        edges = [
            (node, tokens, following)
            for node, leads in enumerate(self._nodes)
            for tokens, following in leads.items()
        ]
        for _, tokens, following in edges:
            if self._nodes[following] and not stops.isdisjoint(tokens):
                raise ValueError(
                    "A stop token is also a part of what the constraint "
                    "allows, so that an answer's end is not known. Expected: "
                    "other stop_token_ids. Received: the tokens "
                    f"{sorted(stops.intersection(tokens))[:8]}."
                )
        classes = {
            tokens: number
            for number, tokens in enumerate(
                dict.fromkeys(token for node in self._nodes for token in node),
                1,
            )
        }
        token_classes = np.zeros(self.vocabulary_size, "int32")
        for tokens, number in classes.items():
            ids = list(tokens)
            if token_classes[ids].any():
                raise ValueError(
                    "Sets of tokens overlap, so that the next node is not "
                    "known. Expected: labels without <loc> and <seg>. "
                    f"Received: the tokens {ids[:8]}."
                )
            token_classes[ids] = number
        shape = bucket(len(self._nodes), 32), bucket(len(classes) + 1, 32)
        next_nodes = np.full(shape, -1, "int32")
        token_classes[list(banned)] = 0
        edges = [edge for edge in edges if not banned.issuperset(edge[1])]
        for node, tokens, following in edges:
            next_nodes[node, classes[tokens]] = following
        for node in self._free:
            next_nodes[node] = node
        ends_in = np.zeros(shape[0], "int32")
        ends_in[: len(self._nodes)] = self._ends_in(edges)
        return {
            "token_classes": token_classes,
            "next_nodes": next_nodes,
            "ends_in": ends_in,
        }

    def _ends_in(self, edges):
        """Return the least number of tokens from each node to an end."""
        before = [[] for _ in self._nodes]
        for node, _, following in edges:
            before[following].append(node)
        # Free nodes have no edges here: they may end at any token.
        ends_in = [NEVER if leads else 0 for leads in self._nodes]
        reached = [node for node, leads in enumerate(self._nodes) if not leads]
        for node in reached:  # Breadth-first; grows in the loop.
            for earlier in before[node]:
                if ends_in[earlier] == NEVER:
                    ends_in[earlier] = ends_in[node] + 1
                    reached.append(earlier)
        return ends_in


def node_after(arrays, node, ids):
    """Return the node after some tokens, or -1 if they are not allowed.

    Args:
        arrays: dict, from `Automaton.arrays`.
        node: int.
        ids: ints.
    """
    for token in ids:
        node = arrays["next_nodes"][node, arrays["token_classes"][token]]
        if node < 0:
            return -1
    return node


def one_of(automaton, choices, tokenizer, stops):
    """Restrict an answer to one of some texts; return its start node."""
    start = automaton.add_node()
    for tokens in plain_rows(tokenizer, list(choices)):
        automaton.add_path(start, [*((token,) for token in tokens), stops])
    return start


def objects_of(automaton, prompt, tokenizer, stops):
    """Restrict an answer to the objects of its prompt; return its start node.

    Args:
        automaton: `Automaton`.
        prompt: str. After "detect", an object is four locations and one of
            the prompt's labels; after "segment", sixteen mask codes stand
            between them. " ; " separates objects. There may be no objects.
            Other prompts have no restriction.
        tokenizer: `PaliGemmaTokenizer`.
        stops: tuple of ints that end an answer.
    """
    found = re.fullmatch(r"(detect|segment) (.+)", prompt.strip(), re.DOTALL)
    labels = [] if found is None else map(str.strip, found[2].split(";"))
    labels = [label for label in labels if label]
    if found is None or not labels:
        return automaton.add_free_node()
    locations = _numbered(tokenizer, "<loc{:04}>", 1024)
    place = [locations] * 4
    if found[1] == "segment":
        place += [_numbered(tokenizer, "<seg{:03}>", 128)] * 16
    start = automaton.add_node()
    automaton.add_path(start, [stops])
    labelled = automaton.add_path(start, place)
    for label in labels:
        # Tokenized within an answer, which may differ from the label alone.
        text = f"<loc0000> {label}"
        ended, followed = plain_rows(tokenizer, [text, f"{text} ; <loc0000>"])
        _, *between, _ = ((token,) for token in followed)
        # After the separator the next object begins with its first location.
        second = automaton.add_path(start, [locations])
        automaton.add_path(labelled, [*between, locations], end=second)
        _, *alone = ((token,) for token in ended)
        automaton.add_path(labelled, [*alone, stops])
    return start


def _numbered(tokenizer, pattern, count):
    """Return the ids of a numbered kind of token, such as locations."""
    return tuple(tokenizer.token_to_id(pattern.format(i)) for i in range(count))
