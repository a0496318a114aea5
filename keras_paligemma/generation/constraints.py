"""Constraints of answers: an automaton over tokens, as arrays."""

from keras import ops


def legal(shared, node_B, left_B):
    """Return which tokens may follow, bool (B, V).

    A legal token is allowed by the automaton and leads to an end within
    `left_B` tokens. If no such token exists, all allowed tokens are legal.

    Args:
        shared: as in `follow`, and `ends_in` int32 (nodes,), the least number
            of tokens from a node to an end.
        node_B: int32 tensor.
        left_B: int32 tensor, how many tokens each answer may still have.
    """
    next_BV = follow(shared, node_B[:, None], None)
    allowed_BV = next_BV >= 0
    ends_in_BV = ops.take(shared["ends_in"], ops.maximum(next_BV, 0))
    in_time_BV = ops.logical_and(allowed_BV, ends_in_BV < left_B[:, None])
    can_B1 = ops.any(in_time_BV, axis=1, keepdims=True)
    return ops.where(can_B1, in_time_BV, allowed_BV)


def follow(shared, node, token_B):
    """Return the node after a token, or after each token of the vocabulary.

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
    # Forbidden tokens have no next node: a row that took one goes to node 0.
    return ops.take(flat, ops.maximum(node, 0) * count + classes)
