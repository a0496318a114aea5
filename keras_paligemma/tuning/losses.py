"""Cross-entropy over a large vocabulary without all logits in memory."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.layers.remat import rematerialize
from keras_paligemma.types import Config
from keras_paligemma.types import Tensor

MEANS = ("example", "token")
# Assumed size of a batch of unknown size: Keras's default.
USUAL_BATCH = 32
# Tokens whose logits an accelerator has in memory at a time.
CHUNK_TOKENS = 256


@keras.saving.register_keras_serializable(package="keras_paligemma")
class StreamedCrossEntropy(keras.losses.Loss):
    """Cross-entropy of the responses, as in the original: `loss="auto"`.

    The logits of a batch over 257,152 pieces would be by far the largest
    tensor of a training step. So the head is applied to `chunk_tokens` tokens
    at a time. If it is frozen, the gradient is computed in the same pass;
    otherwise the head is applied again in the backward pass. The accuracy of
    the most likely token comes from the same pass.

    Args:
        label_smoothing: float ε: the target has probability 1 − ε, every
            other piece ε / (V − 1).
        mean: str, "example" averages over the tokens of each response, then
            over examples, as in the original; "token" averages over all
            tokens, so that long responses weigh more.
        final_soft_cap: bool; `True` applies the soft cap that `generate` uses,
            if the variant has one (PaliGemma 2, but not PaliGemma 1); `False`
            omits it, as the original's trainer does.
        chunk_tokens: int, tokens whose logits are in memory at a time on a
            device, at least one per row. `None` for 256, or 32 on a CPU.

    Raises:
        ValueError: unknown mean, another `reduction`, or `label_smoothing`
            outside of [0, 1).

    Example:

    ```python
    model.compile("adam", loss=StreamedCrossEntropy(label_smoothing=0.1))
    ```

    Source: big_vision, `trainers/proj/paligemma/train.py`.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        mean: str = "example",
        final_soft_cap: bool = True,
        chunk_tokens: int | None = None,
        name: str = "streamed_cross_entropy",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        if self.reduction != "sum_over_batch_size":
            raise ValueError(
                "The loss is a mean over a batch. Received: reduction="
                f"{self.reduction!r}. Expected: `mean`, one of {MEANS}."
            )
        if mean not in MEANS:
            raise ValueError(
                f"Unknown mean. Received: {mean!r}. Expected one of {MEANS}."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                "Label smoothing is a share of at least 0 and below 1. "
                f"Received: {label_smoothing!r}."
            )
        self.label_smoothing = label_smoothing
        self.mean = mean
        self.final_soft_cap = final_soft_cap
        self.chunk_tokens = chunk_tokens

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """Return the loss (B, R) of each token from logits (B, R, V)."""
        return token_losses(y_pred, y_true, self.label_smoothing)[0]

    def stream(
        self,
        hidden_BRD: Tensor,
        head: Callable[[Tensor], Tensor],
        targets_BR: Tensor,
        weights_BR: Tensor,
        training: bool = True,
    ) -> tuple[Tensor, ...]:
        """Compute the loss chunk by chunk, and average it.

        Args:
            hidden_BRD: tensor, last hidden states that predict the responses.
            head: `backbone.head()`, or any function of a tensor (B, tokens,
                D) that returns float32 logits (B, tokens, V).
            targets_BR: int tensor, the ids to predict.
            weights_BR: float tensor, 0 where there is nothing to predict.
            training: bool, whether a gradient is needed.

        Returns:
            Two float32 scalars, the loss and the weighted accuracy of the most
            likely token; and the loss of each example (B,).
        """
        if training and getattr(head, "frozen", False):
            loss_BR, right_BR = self._with_gradient(
                hidden_BRD, head, targets_BR
            )
        else:
            loss_BR, right_BR = self._in_chunks(
                lambda hidden, targets: token_losses(
                    head(hidden), targets, self.label_smoothing
                ),
                hidden_BRD,
                targets_BR,
                variables=getattr(head, "trained", ()),
            )
        return self.average(loss_BR, right_BR, weights_BR)

    def _with_gradient(self, hidden_BRD, head, targets_BR):
        """Compute losses and their gradient in one pass over the head."""

        def one_chunk(hidden, targets):
            logits = head(hidden)
            loss, right = token_losses(logits, targets, self.label_smoothing)
            gradient = head.gradient(
                logits,
                token_gradients(logits, targets, self.label_smoothing),
                hidden.dtype,
            )
            return loss, right, gradient

        @ops.custom_gradient
        def both(hidden_BRD):
            loss_BR, right_BR, gradient_BRD = self._in_chunks(
                one_chunk, hidden_BRD, targets_BR, remat=None
            )

            def backward(*args, upstream=None, variables=()):
                upstream = args[0] if upstream is None else upstream
                scale_BR1 = ops.cast(upstream[0], gradient_BRD.dtype)[..., None]
                gradient = scale_BR1 * gradient_BRD
                # TensorFlow needs gradients of variables even if frozen.
                none = [None] * len(variables)
                return (gradient, none) if variables else gradient

            # One array: backends pass several upstream gradients differently.
            return ops.stack([loss_BR, right_BR]), backward

        loss_BR, right_BR = ops.unstack(both(hidden_BRD), 2)
        return loss_BR, right_BR

    def _in_chunks(
        self,
        function,
        hidden_BRD,
        targets_BR,
        remat: str | None = "block",
        variables=(),
    ):
        """Apply a function of hidden states and targets chunk by chunk.

        Returns:
            Its results, with axes (B, R, …).
        """
        B, R, D = hidden_BRD.shape
        # A chunk has tokens of every row: the batch size may be unknown, as in
        # TensorFlow's graphs, or the batch sharded over devices.
        rows = -(-(B or USUAL_BATCH) // _replicas())
        usual = 32 if platform() == "cpu" else CHUNK_TOKENS
        tokens = self.chunk_tokens or usual
        size = max(1, tokens // rows)
        if size >= R:
            return function(hidden_BRD, targets_BR)
        chunks = -(-R // size)
        size = -(-R // chunks)
        pad = (0, chunks * size - R)
        hidden = ops.pad(hidden_BRD, [(0, 0), pad, (0, 0)])
        targets = ops.pad(targets_BR, [(0, 0), pad])
        hidden = ops.reshape(hidden, (-1, chunks, size, D))
        targets = ops.reshape(targets, (-1, chunks, size))
        chunk_of = rematerialize(function, remat, variables)
        parts = ops.map(
            lambda chunk: chunk_of(*chunk),
            (ops.moveaxis(hidden, 1, 0), ops.moveaxis(targets, 1, 0)),
        )
        return [
            ops.reshape(
                ops.moveaxis(part, 0, 1), (-1, chunks * size, *part.shape[3:])
            )[:, :R]
            for part in parts
        ]

    def counts(self, weights_BR: Tensor) -> Tensor:
        """Return the weights for averaging loss and accuracy over batches."""
        weights_BR = ops.cast(weights_BR, "float32")
        count_B = ops.sum(ops.cast(weights_BR > 0, "float32"), axis=-1)
        if self.mean == "example":
            # A row without weight is not an example: it pads a batch, or was
            # skipped.
            count_B = ops.cast(count_B > 0, "float32")
        return ops.sum(count_B), ops.sum(weights_BR)

    def average(
        self, loss_BR: Tensor, right_BR: Tensor, weights_BR: Tensor
    ) -> Any:
        """Average the results of `token_losses`; return those of `stream`."""
        weights_BR = ops.cast(weights_BR, "float32")
        loss_BR, right_BR = loss_BR * weights_BR, right_BR * weights_BR
        count_B = ops.sum(ops.cast(weights_BR > 0, "float32"), axis=-1)
        loss_B = ops.sum(loss_BR, axis=-1) / ops.maximum(count_B, 1.0)
        count, total = self.counts(weights_BR)
        summed = ops.sum(loss_BR if self.mean == "token" else loss_B)
        loss = summed / ops.maximum(count, 1.0)
        return loss, ops.sum(right_BR) / ops.maximum(total, 1e-6), loss_B

    def get_config(self) -> Config:
        return super().get_config() | {
            "label_smoothing": self.label_smoothing,
            "mean": self.mean,
            "final_soft_cap": self.final_soft_cap,
            "chunk_tokens": self.chunk_tokens,
        }


def _replicas():
    """Return the number of devices that a batch is sharded over."""
    active = keras.distribution.distribution()
    return 1 if active is None else active.num_model_replicas


def token_losses(logits, targets, label_smoothing=0.0):
    """Return cross-entropy and accuracy of each token.

    Args:
        logits: float tensor (..., V).
        targets: int tensor (...).
        label_smoothing: float.

    Returns:
        Two float32 tensors (...): the loss, and 1 where the most likely token
        is the target, else 0.
    """
    logits = ops.cast(logits, "float32")
    targets = ops.cast(targets, "int32")
    total = ops.logsumexp(logits, axis=-1)
    chosen = ops.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = total - chosen
    if label_smoothing:
        others = logits.shape[-1] - 1
        sum_of_others = ops.sum(logits, axis=-1) - chosen
        loss = (1 - label_smoothing) * loss + label_smoothing * (
            total - sum_of_others / others
        )
    best = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return loss, ops.cast(ops.equal(best, targets), "float32")


def token_gradients(logits, targets, label_smoothing=0.0):
    """Return the gradient of each token's loss with respect to its logits.

    Args:
        logits: float32 tensor (..., V).
        targets: int tensor (...).
        label_smoothing: float.

    Returns:
        float32 tensor (..., V).
    """
    V = logits.shape[-1]
    others = label_smoothing / (V - 1)
    pieces = ops.arange(V, dtype="int32")
    wanted = ops.where(
        ops.equal(pieces, ops.cast(targets, "int32")[..., None]),
        1 - label_smoothing,
        others,
    )
    return ops.softmax(logits, axis=-1) - ops.cast(wanted, "float32")
