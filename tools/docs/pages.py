"""Run the code blocks of README and docs, page by page and in order.

A block that cannot run states the reason in a comment above it, which readers
do not see: `<!-- not run: the reason -->`. A `text` block below a `python`
block is the expected output. Only the standard library is imported, so that any
environment can run a page: `python tools/docs/pages.py docs/guides/ask.md`.
"""

import contextlib
import io
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("bash", "sh")
DATA = ("", "dockerfile", "ini", "json", "proto", "text", "toml", "yaml")


class Block(NamedTuple):
    """A code block of a page, as a reader copies it."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """Read the blocks of a page."""
    text = page.read_text("utf-8")
    return [
        Block(
            text.count("\n", 0, match.start("code")),
            match["language"],
            textwrap.dedent(match["code"]),
            match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]


def run_page(page: Path, run_shell: Callable[[str], object]) -> None:
    """Run the blocks of a page and compare their output.

    Args:
        page: path of a Markdown file.
        run_shell: function of the code of a `bash` block; raises if it fails.
    """
    names, printed = {"__name__": page.stem}, None
    for block in blocks(page):
        if block.reason is not None:
            printed = None
        elif block.language == "python":
            printed = run_python(block, page, names)
        elif block.language in SHELL:
            run_shell(block.code)
        else:
            where = f"{page}, line {block.line}"
            assert block.language in DATA, f"{where}: mark it"
            if block.language == "text" and printed is not None:
                expected = block.code.rstrip()
                assert printed.rstrip() == expected, (where, printed, expected)


def run_python(block: Block, page: Path, names: dict) -> str:
    """Run a block after the blocks above it, and return its output."""
    code = compile("\n" * block.line + block.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def in_bash(code: str) -> None:
    """Run code as a reader pastes it into a terminal."""
    subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        run_page(Path(argument), in_bash)
