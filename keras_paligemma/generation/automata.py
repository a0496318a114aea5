"""Constraints as automata over tokens: built from text, handed over as data."""

import re

import numpy as np

from keras_paligemma.generation.requests import bucket


class Automaton:
    """Which token may follow which, for a batch whose rows begin anywhere.

    A node is a dict of a set of tokens to the node that they lead to. Sets
    that are not equal share no token.

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
        """Make a node that nothing leaves, and give its number."""
        self._nodes.append({})
        return len(self._nodes) - 1

    def add_free_node(self):
        """Make a node that every token leads back to."""
        self._free.append(self.add_node())
        return self._free[-1]

    def add_path(self, node, path, end=None):
        """Let sets of tokens follow one another, and give the last node.

        Args:
            node: int, where the path begins. What it shares with others from
                there is one.
            path: list of tuples of ints.
            end: int, the last node; a new one if `None`.
        """
        for place, tokens in enumerate(path):
            is_last = place == len(path) - 1
            if is_last and end is not None:
                self._nodes[node][tokens] = end
            elif tokens not in self._nodes[node]:
                # Before the dict is written: it makes a node.
                following = self.add_node()
                self._nodes[node][tokens] = following
            node = self._nodes[node][tokens]
        return node

    def arrays(self):
        """Return `token_classes` and `next_nodes`, as `constraints` reads them.

        Both sizes of `next_nodes` are powers of two, which other constraints
        share, so that few of them compile a program.
        """
        classes = {
            tokens: number
            for number, tokens in enumerate(
                dict.fromkeys(one for node in self._nodes for one in node), 1
            )
        }
        token_classes = np.zeros(self.vocabulary_size, "int32")
        for tokens, number in classes.items():
            token_classes[list(tokens)] = number
        shape = bucket(len(self._nodes), 32), bucket(len(classes) + 1, 32)
        next_nodes = np.full(shape, -1, "int32")
        for node, leads in enumerate(self._nodes):
            for tokens, following in leads.items():
                next_nodes[node, classes[tokens]] = following
        for node in self._free:
            next_nodes[node] = node
        return {"token_classes": token_classes, "next_nodes": next_nodes}


def one_of(automaton, choices, tokenizer, stops):
    """Let an answer be one of some texts: the node where it begins."""
    start = automaton.add_node()
    for text in choices:
        tokens = tokenizer.tokenize(text)
        automaton.add_path(start, [*((one,) for one in tokens), stops])
    return start


def objects_of(automaton, prompt, tokenizer, stops):
    """Let an answer be what its prompt asks for: the node where it begins.

    Args:
        automaton: `Automaton`.
        prompt: str. After "detect" four locations and one of its labels make
            an object, after "segment" sixteen codes of a mask stand between
            them; " ; " separates objects, of which there may be none. Other
            prompts restrict nothing.
        tokenizer: `PaliGemmaTokenizer`.
        stops: tuple of ints that end an answer.
    """
    found = re.fullmatch(r"(detect|segment) (.+)", prompt.strip(), re.DOTALL)
    if found is None:
        return automaton.add_free_node()
    locations = _numbered(tokenizer, "<loc{:04}>", 1024)
    place = [locations] * 4
    if found[1] == "segment":
        place += [_numbered(tokenizer, "<seg{:03}>", 128)] * 16
    start = automaton.add_node()
    automaton.add_path(start, [stops])
    labelled = automaton.add_path(start, place)
    for label in found[2].split(";"):
        # As it is read within an answer, which may differ from by itself.
        text = f"<loc0000> {label.strip()} ; <loc0000>"
        _, *between, _ = ((one,) for one in tokenizer.tokenize(text))
        # Behind the separator the next object begins: its first location.
        second = automaton.add_path(start, [locations])
        automaton.add_path(labelled, [*between, locations], end=second)
        _, *alone = tokenizer.tokenize(f"<loc0000> {label.strip()}")
        automaton.add_path(labelled, [*((one,) for one in alone), stops])
    return start


def _numbered(tokenizer, pattern, count):
    """Return the ids of the tokens of a kind."""
    return tuple(tokenizer.token_to_id(pattern.format(i)) for i in range(count))
