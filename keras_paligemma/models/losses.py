"""Cross-entropy over a large vocabulary without its logits in memory."""

import keras
from keras import ops


def streamed_cross_entropy(
    hidden_BRD, head, targets_BR, weights_BR, chunk_tokens=1024
):
    """Average the loss of the responses, chunk of tokens by chunk.

    A batch of logits over 257,152 pieces would be the largest tensor of a
    training step by far. Here the head is applied to `chunk_tokens` tokens at
    a time and, in the backward pass, applied again.

    Args:
        hidden_BRD: tensor, last hidden states that predict the responses.
        head: function of a tensor (tokens, D) that gives float32 logits
            (tokens, V).
        targets_BR: int tensor, the ids to predict.
        weights_BR: float tensor, 0 where there is nothing to predict.
        chunk_tokens: int, tokens whose logits exist at a time.

    Returns:
        Two float32 scalars: the mean over examples of each example's mean
        loss, where a row of no weight is no example, and the weighted share
        of tokens whose best guess is right.

    Source: big_vision `train.py` for the two means.
    """
    B, R, D = hidden_BRD.shape
    B = ops.shape(hidden_BRD)[0] if B is None else B

    def one_chunk(hidden_CD, targets_C):
        logits_CV = head(hidden_CD)
        best_C = ops.cast(ops.argmax(logits_CV, axis=-1), targets_C.dtype)
        right_C = ops.cast(ops.equal(best_C, targets_C), "float32")
        loss_C = keras.losses.sparse_categorical_crossentropy(
            targets_C, logits_CV, from_logits=True
        )
        return loss_C, right_C

    chunks = 1
    if not isinstance(B, int) or B * R <= chunk_tokens:
        loss, right = one_chunk(
            ops.reshape(hidden_BRD, (-1, D)), ops.reshape(targets_BR, (-1,))
        )
    else:
        chunks = -(-B * R // chunk_tokens)
        size = -(-B * R // chunks)
        pad = chunks * size - B * R
        hidden = ops.pad(ops.reshape(hidden_BRD, (-1, D)), [(0, pad), (0, 0)])
        targets = ops.pad(ops.reshape(targets_BR, (-1,)), [(0, pad)])
        loss, right = ops.map(
            lambda chunk: keras.remat(one_chunk)(*chunk),
            (
                ops.reshape(hidden, (chunks, size, D)),
                ops.reshape(targets, (chunks, size)),
            ),
        )
        loss = ops.reshape(loss, (-1,))[: B * R]
        right = ops.reshape(right, (-1,))[: B * R]
    weights_BR = ops.cast(weights_BR, "float32")
    loss_BR = ops.reshape(loss, ops.shape(weights_BR)) * weights_BR
    right_BR = ops.reshape(right, ops.shape(weights_BR)) * weights_BR
    # A row of weight 0 is no example: it fills a batch, or was skipped.
    weight_B = ops.sum(weights_BR, axis=-1)
    loss_B = ops.sum(loss_BR, axis=-1) / ops.maximum(weight_B, 1e-6)
    examples = ops.sum(ops.cast(ops.greater(weight_B, 0), "float32"))
    loss = ops.sum(loss_B) / ops.maximum(examples, 1.0)
    return loss, ops.sum(right_BR) / ops.maximum(ops.sum(weights_BR), 1e-6)


def responses_only(y, y_pred):
    """Cut predictions of the whole text to those of the responses.

    Keras builds losses and metrics by a plain call before the first step.
    """
    length = y.shape[1]
    if y_pred.shape[1] == length:
        return y_pred
    return y_pred[:, -length - 1 : -1]
