"""Checks that a separate process reports, each of them as a test's item."""

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
    """Report a block of assertions by name, and continue after a failure."""
    try:
        yield
    except Exception:
        found = traceback.format_exc()
    else:
        found = "passed"
    print(MARK + json.dumps([name, found]), flush=True)


def reported(lines):
    """Convert printed lines to a dict of name to "passed" or a traceback."""
    checks = [line for line in lines if line.startswith(MARK)]
    return dict(json.loads(line.removeprefix(MARK)) for line in checks)


def once(tmp_path_factory, name, compute):
    """Compute a result in one of pytest's workers, and return it in all.

    A module's fixture runs in each worker that runs some of its tests.

    Args:
        tmp_path_factory: pytest's fixture.
        name: str, unique.
        compute: function of a new folder that returns a JSON value.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # The workers of a run share it.
    result = root / f"{name}.json"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            # The name is unique, since this may be a retry after an error.
            folder = Path(tempfile.mkdtemp(prefix=name, dir=root))
            result.write_text(json.dumps(compute(folder)))
    return json.loads(result.read_text())
