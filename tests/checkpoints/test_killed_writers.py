"""Killed half-way, a folder is absent or whole, or still the old one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("to", "before"),
    [
        ("keras", "absent"),
        ("keras", "old"),
        ("peft", "old"),
        ("transformers", "absent"),
        ("transformers", "empty"),
        ("keras_hub", "absent"),
    ],
)
def test_killed_at_many_steps(golden_backbone, tmp_path, to, before):
    golden_backbone().save_to_preset(tmp_path / "source")
    (tmp_path / "home").mkdir()
    result = subprocess.run(
        [
            sys.executable,
            *("-m", "tests.checkpoints.killed_writers"),
            *(tmp_path / "source", tmp_path / "home", to, before),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    _, killed, whole, value = lines[-1]
    assert not killed and value == 2
    entry = "adapter_config.json" if to == "peft" else "config.json"
    assert entry in whole
    nothing = 1 if before == "old" else None
    for kind, _, names, value in lines:
        assert value == nothing if kind == "arrays" else value in (nothing, 2)
        # Readers that know nothing of us find the whole or no entry, and the
        # notes of a user are never touched.
        assert names == whole or entry not in names
        assert before != "old" or "notes.txt" in names
    values = [value for kind, _, _, value in lines if kind == "calls"]
    # Old up to one step, new from there on; both were seen.
    assert values.count(nothing) > 4 and values.count(2) > 1
    assert values == sorted(values, key=lambda value: value == 2)
