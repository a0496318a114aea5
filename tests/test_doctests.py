"""Docstring examples with `>>>` run and give the shown results."""

import doctest
import importlib
from pathlib import Path

import pytest

import keras_paligemma

PACKAGE = Path(keras_paligemma.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
