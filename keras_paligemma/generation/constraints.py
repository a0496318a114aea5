"""Constraints of answers: an automaton over tokens, as arrays."""

from keras import ops


def legal(shared, node_B):
    """Return which tokens may follow, bool (B, V)."""
    return follow(shared, node_B[:, None], None) >= 0


def follow(shared, node, token_B):
    """Return the node after a token, or after each of the vocabulary.

    Args:
        shared: dict of `token_classes` int32 (V,), the class of each token,
            and `next_nodes` int32 (nodes, classes), the node that a class
            leads to, or -1.
        node: int32 tensor (B,), or (B, 1) for the whole vocabulary.
        token_B: int32 tensor (B,), or `None` for the whole vocabulary.

    Returns:
        int32 tensor (B,) or (B, V).
    """
    class_V = shared["token_classes"]
    classes = class_V[None] if token_B is None else ops.take(class_V, token_B)
    nodes, count = shared["next_nodes"].shape
    flat = ops.reshape(shared["next_nodes"], (nodes * count,))
    # Forbidden tokens lead nowhere: a row that took one stays at node 0.
    return ops.take(flat, ops.maximum(node, 0) * count + classes)
