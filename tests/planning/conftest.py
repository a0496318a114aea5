"""The compiler's processes start without TensorFlow."""

import pytest

from tests.helpers.processes import WITHOUT_TENSORFLOW


@pytest.fixture(autouse=True)
def without_tensorflow(monkeypatch):
    for name, value in WITHOUT_TENSORFLOW.items():
        monkeypatch.setenv(name, value)
