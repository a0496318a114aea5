"""Follow the documentation as a new user does.

    python -m tools.newcomer --python python3.13

The wheel is built and installed into a new environment by the command in
docs/install.md that covers all pages. Then the commands, the demo and the code
blocks of README and docs run as printed. Each page runs in a folder with the
files of `keras-paligemma examples`, and without access to a checkout.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.docs.pages import PAGES
from tools.docs.pages import ROOT
from tools.docs.pages import blocks

COMMANDS = (
    "keras-paligemma --version",
    "keras-paligemma --help",
    "python -m keras_paligemma --help",
    "keras-paligemma inspect pali_gemma2_nano_112",
    "python -m keras_paligemma.demo",
)


def install_line() -> str:
    """Read the command that installs everything that the pages' code needs."""
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    found = re.search(
        "the code of all pages.*?^ *(pip .*?)$", page, re.S | re.M
    )
    assert found, "docs/install.md has no command for the code of all pages"
    return found[1]


class Newcomer:
    """A separate environment and folder.

    Args:
        python: str, command of the interpreter for the environment.
        folder: path, an empty folder.
    """

    def __init__(self, python: str, folder: Path):
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        environment = folder / "environment"
        subprocess.run([python, "-m", "venv", environment], check=True)
        # Remove variables of this checkout and of the current environment.
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("KERAS", "PYTHON"))
        } | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(environment),
            "KERAS_BACKEND": "jax",
            "PIP_FIND_LINKS": str(folder / "dist"),
        }

    def run(self, command: str, cwd: Path | None = None) -> None:
        """Run a shell command, and exit if it fails."""
        started = time.monotonic()
        print(f"$ {command}", flush=True)
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=cwd or self.home,
            env=self.variables,
            check=True,
        )
        print(f"  {time.monotonic() - started:.1f} s", flush=True)

    def read(self, page: Path) -> None:
        """Run the blocks of a page in a separate folder."""
        place = self.folder / "pages" / page.stem
        place.mkdir(parents=True)
        # The runner is copied alone, so that no neighbouring module is
        # importable.
        runner = shutil.copy(ROOT / "tools" / "docs" / "pages.py", place.parent)
        copied = shutil.copy(page, place.parent)
        self.run("keras-paligemma examples", place)
        self.run(f"python {runner} {copied}", place)


def main() -> None:
    """Run all pages, and stop at the first failure."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument(
        "--wheel", type=Path, help="one that is built; else it is made"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        newcomer = Newcomer(options.python, folder)
        if options.wheel:
            (folder / "dist").mkdir()
            shutil.copy(options.wheel, folder / "dist")
        else:
            newcomer.run(f"pip wheel -q --no-deps -w {folder / 'dist'} {ROOT}")
        newcomer.run(install_line())
        for command in COMMANDS:
            newcomer.run(command)
        for page in PAGES:
            if any(block.reason is None for block in blocks(page)):
                newcomer.read(page)


if __name__ == "__main__":
    main()
