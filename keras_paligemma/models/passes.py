"""One forward pass over what a user hands in, for scores and the like."""

from typing import Any

import numpy as np

from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.data.batches import in_batches
from keras_paligemma.generation.requests import bucket
from keras_paligemma.models.answering import tensors
from keras_paligemma.models.inputs import typed
from keras_paligemma.turns import write_back


def check_preprocessor(model, method):
    """Refuse a model without preprocessor.

    Args:
        model: `PaliGemmaCausalLM`.
        method: str, name of the method that was called.
    """
    if model.preprocessor is None:
        raise ValueError(
            f"`{method}` reads text and pictures. Received: a model without a "
            "preprocessor. Expected: `model.preprocessor`, or calls of the "
            "backbone with arrays."
        )


def parts_of(inputs, batch_size):
    """Return pairs of a batch and its number of examples, `None` for all."""
    parts = batch_size is not None and in_batches(inputs, batch_size)
    return parts or [(inputs, None)]


def batched(arrays, single):
    """Return arrays with a batch axis, as a new dict."""
    if single:
        return {name: array[None] for name, array in arrays.items()}
    return dict(arrays)


def run_pass(model, function, rows, plan=None) -> Any:
    """Run a program for rows, padded to their bucket; threads take turns.

    Args:
        model: `PaliGemmaCausalLM`.
        function: function of the model, `plan` and a dict of tensors, to a
            tensor or a dict of tensors with the batch first.
        rows: dict of arrays (B, …).
        plan: hashable, what the program is compiled for.

    Returns:
        Array (B, …), or a dict of them.
    """
    [count] = {len(one) for one in rows.values()}
    more = bucket(count) - count
    rows = {
        name: np.concatenate([one, np.repeat(one[-1:], more, 0)])
        for name, one in rows.items()
    }
    with model.turns:
        write_back(model)
        rows, here = rows_to_devices(rows)
        rows = typed(rows, model.backbone.vocabulary_size)
        found = model.make_generate_function()(function, plan, *tensors([rows]))
    if not isinstance(found, dict):
        return to_host(found)[here][:count]
    return {name: to_host(one)[here][:count] for name, one in found.items()}
