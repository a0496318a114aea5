"""One forward pass over a user's inputs, for example to compute scores."""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np

from keras_paligemma.compat import rows_to_devices
from keras_paligemma.compat import to_host
from keras_paligemma.data.batches import in_batches
from keras_paligemma.data.batches import in_parts
from keras_paligemma.generation.requests import bucket
from keras_paligemma.models.inputs import typed
from keras_paligemma.preprocessing.inputs import check_dictionary


def check_preprocessor(model, method):
    """Raise on a model without preprocessor.

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


def check_has_prompts(inputs, method):
    """Raise on a dict of arrays where prompts are needed.

    Args:
        inputs: dict, a user's.
        method: str, name of the method that was called.
    """
    check_dictionary(inputs)
    if inputs.get("prompts") is None:
        raise ValueError(
            f"`{method}` reads text. Expected: 'prompts'. Received: "
            f"{sorted(inputs)}. Preprocessed arrays go to `generate`, or to "
            "calls of the model."
        )


def parts_of(inputs, batch_size) -> list[tuple[dict, Any]]:
    """Return pairs of a batch and its number of examples, `None` for all."""
    parts = batch_size is not None and in_batches(inputs, batch_size)
    return parts or [(inputs, None)]


def batched(arrays, single):
    """Return arrays with a batch axis, as a new dict."""
    if single:
        return {name: array[None] for name, array in arrays.items()}
    return dict(arrays)


class Examples(NamedTuple):
    """Prompts and their responses, as `fit` preprocesses them.

    Fields:
        rows: dict of arrays (B, …), as a program takes them.
        targets: int32 array (B, R), the tokens of the responses.
        real: bool array (B, R), False on padding.
        single: bool, whether they came without a batch axis.
    """

    rows: dict
    targets: np.ndarray
    real: np.ndarray
    single: bool

    def ids(self, row):
        """Return the tokens of a response without padding."""
        return self.targets[row][self.real[row]]


def examples_of(model, inputs):
    """Preprocess a user's inputs with responses; return `Examples`."""
    x, y, weights = model.preprocessor(inputs)
    single = y.ndim == 1
    targets, weights = np.atleast_2d(y, weights)
    rows, *_ = in_parts(batched(x, single), targets)
    return Examples(rows, targets, weights > 0, single)


def run_pass(model, function, rows, plan=None, shared=None) -> Any:
    """Run a program for rows and return arrays of the host.

    Args:
        model, function, rows, plan, shared: as `run_on_device` takes them.

    Returns:
        Array (B, …), or a dict of them.
    """
    count = len(next(iter(rows.values())))
    found, here = run_on_device(model, function, rows, plan, shared)
    return keras.tree.map_structure(
        lambda array: to_host(array)[here][:count], found
    )


def run_on_device(model, function, rows, plan=None, shared=None):
    """Run a program for rows, padded to their bucket; threads take turns.

    Args:
        model: `PaliGemmaCausalLM`.
        function: function of the model, `plan`, a dict of tensors and, if not
            `None`, `shared`.
        rows: dict of arrays (B, …).
        plan: hashable, compile-time parameters of the program.
        shared: nest of arrays without the batch, or `None`.

    Returns:
        A nest of tensors with the padded batch first, and the slice of it that
        belongs to this process.
    """
    [count] = {len(array) for array in rows.values()}
    more = bucket(count) - count
    rows = {
        name: np.concatenate([array, np.repeat(array[-1:], more, 0)])
        for name, array in rows.items()
    }
    with model.turns:
        rows, here = rows_to_devices(rows)
        rows = typed(rows, model.backbone.vocabulary_size)
        given = [rows] if shared is None else [rows, shared]
        programs = model.make_generate_function()
        return programs(function, plan, *given), here
