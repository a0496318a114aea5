"""The compiler's processes start without packages that few users have."""

import pytest

from tests.helpers.processes import LEAN


@pytest.fixture(autouse=True)
def lean_processes(monkeypatch):
    for name, value in LEAN.items():
        monkeypatch.setenv(name, value)
