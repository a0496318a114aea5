"""Checks that a process of its own reports, each of them a test's item."""

import contextlib
import fcntl
import json
import os
import tempfile
import traceback
from pathlib import Path

MARK = "check "


@contextlib.contextmanager
def check(name):
    """Report a block of assertions by name; what follows it runs anyway."""
    try:
        yield
    except Exception:
        found = traceback.format_exc()
    else:
        found = "passed"
    print(MARK + json.dumps([name, found]), flush=True)


def reported(lines):
    """Return a dict of name to "passed" or a traceback, from printed lines."""
    checks = [line for line in lines if line.startswith(MARK)]
    return dict(json.loads(line.removeprefix(MARK)) for line in checks)


def once(tmp_path_factory, name, compute):
    """Return the result of a function that one of pytest's workers runs.

    A module's fixture runs in each worker that takes some of its tests.

    Args:
        tmp_path_factory: pytest's fixture.
        name: str, unique.
        compute: function of a new folder that returns a JSON value.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # Which the workers of a run share.
    result = root / f"{name}.json"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            # Not of a fixed name: it may be the second try, after an error.
            folder = Path(tempfile.mkdtemp(prefix=name, dir=root))
            result.write_text(json.dumps(compute(folder)))
    return json.loads(result.read_text())
