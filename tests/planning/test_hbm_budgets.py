"""A training step stays within its recorded memory budget."""

import json

import keras
import pytest

from keras_paligemma.planning.compiled import has_compiler
from tests.planning import hbm_budgets

MEND = "To take it as the budget: python -m tests.planning.hbm_budgets"


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX's step is compiled"
)
@pytest.mark.skipif(
    not has_compiler(), reason="libtpu is not installed: no TPU compiler"
)
def test_steps_keep_their_budgets():
    budgets = json.loads(hbm_budgets.TABLE.read_text(encoding="utf-8"))
    found = hbm_budgets.compile_plans()
    assert found.keys() == budgets.keys(), MEND
    above = {k: v for k, v in found.items() if v > budgets[k]}
    assert not above, f"More than the budget: {above}. {MEND}"
    stale = {k: v for k, v in found.items() if v < 0.9 * budgets[k]}
    assert not stale, f"More than 10 % below the budget: {stale}. {MEND}"
