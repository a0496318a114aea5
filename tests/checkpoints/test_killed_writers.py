"""A killed writer leaves a folder that is absent, complete or unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import LEAN

CASES = [
    "keras absent",
    "keras old",
    "peft old",
    "transformers absent",
    "transformers empty",
    "keras_hub absent",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Return what each kill left, by case; one process starts all writers."""
    home = tmp_path_factory.mktemp("home")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.checkpoints.killed_writers",
            home,
            *CASES,
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | LEAN,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = {}
    for line in result.stdout.splitlines():
        case, *outcome = json.loads(line)
        found.setdefault(case, []).append(outcome)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_step(outcomes, case):
    to, before = case.split()
    _, killed, whole, value = outcomes[case][-1]
    assert not killed and value == 2
    entry = "adapter_config.json" if to == "peft" else "config.json"
    assert entry in whole
    nothing = 1 if before == "old" else None
    for kind, _, names, value in outcomes[case]:
        assert value == nothing if kind == "arrays" else value in (nothing, 2)
        # Readers that do not know our format find a complete entry or none. A
        # user's notes are never changed.
        assert names == whole or entry not in names
        assert before != "old" or "notes.txt" in names
    values = [
        outcome[-1] for outcome in outcomes[case] if outcome[0] == "calls"
    ]
    # The old values up to some step, and the new values from there on; both
    # occur.
    assert values.count(nothing) > 4 and values.count(2) > 1
    assert values == sorted(values, key=lambda value: value == 2)
