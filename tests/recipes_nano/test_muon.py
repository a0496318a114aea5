"""Attention's kernels are one matrix each, with the outputs first."""

import contextlib

import keras
import numpy as np
import pytest

from recipes.nano.muon import Muon


def stepped(optimizer, name, value, gradients):
    """Return a variable after a step for each gradient."""
    *scopes, last = name.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        variable = keras.Variable(value, name=last)
    assert variable.path == name
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
    return keras.ops.convert_to_numpy(variable)


def values(shape):
    return np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("blocks/0/attention/query/kernel", (2, 3, 8), (6, 8)),
        ("blocks/0/attention/output/kernel", (8, 2, 3), (8, 6)),
        ("blocks/0/mlp/up/kernel", (5, 8), (5, 8)),
    ],
)
def test_a_kernel_is_stepped_as_a_matrix(name, shape, matrix):
    first, *gradients = values(shape)
    options = {"learning_rate": 0.1, "weight_decay": 0.5}
    found = stepped(Muon(**options), name, first, gradients)
    wanted = stepped(
        keras.optimizers.Muon(**options),
        "a/kernel",
        first.reshape(matrix),
        [gradient.reshape(matrix) for gradient in gradients],
    )
    np.testing.assert_allclose(found.reshape(matrix), wanted, rtol=1e-5)
    assert np.abs(found - first).max() > 1e-2


@pytest.mark.parametrize("name", ["blocks/0/norm/scale", "names/kernel"])
def test_other_weights_are_stepped_by_adam(name):
    """Also heads, whose outputs are not hidden states."""
    first, *gradients = values((4, 8))
    adam, muon = keras.optimizers.Adam(0.1), Muon(0.1, adam_weight_decay=None)
    found = stepped(muon, name, first, gradients)
    wanted = stepped(adam, "a/kernel", first, gradients)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
