"""The code blocks of README and docs run, page by page and in their order.

A block that cannot run here says why, in a comment above it that readers do not
see: `<!-- not run: the reason -->`. `text` below `python` is what that prints.
"""

import collections
import contextlib
import io
import re
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from tools.docs import build

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
SHELL = ("bash", "sh")
DATA = ("", "dockerfile", "ini", "json", "proto", "text", "toml", "yaml")
COMMAND = "keras-paligemma "

# How many blocks are not run, by their reason: a change here is to be seen.
NOT_RUN = {
    "pip needs a network": 7,
    "CI does": 1,
    "its names are of a runtime; tests/export/alone.py has them": 1,
    "needs a cloud project": 3,
    "needs several hosts; tests run examples/multi_host.py": 2,
    "needs the chips of a slice": 2,
    "needs the data of TextVQA": 1,
    "tests/serve runs it": 1,
    "tests/serve/test_openai.py runs the like": 1,
    "tests/export runs it, in processes of TensorFlow": 1,
    "needs podman": 1,
    "vae-oid.npz is a download": 1,
    "trains for an hour": 1,
}


class Block(NamedTuple):
    """Code on a page, as a reader copies it."""

    line: int
    language: str
    code: str
    reason: str | None


def blocks(page):
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


def run_commands(code):
    """Run the lines of a shell, all of which are commands of the package."""
    for line in code.replace("\\\n", " ").splitlines():
        line = line.partition(" #")[0].strip()
        assert line.startswith(COMMAND), f"cannot run {line!r} here"
        result = CliRunner().invoke(
            cli.app, shlex.split(line)[1:], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output


def run_python(block, page, names):
    """Run a block after those above it; give what it prints."""
    code = compile("\n" * block.line + block.code, str(page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not b.reason for b in blocks(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names, printed = {"__name__": page.stem}, None
    for block in blocks(page):
        if block.reason is not None:
            printed = None
        elif block.language == "python":
            printed = run_python(block, page, names)
        elif block.language in SHELL:
            run_commands(block.code)
        else:
            assert block.language in DATA, f"line {block.line}: mark it"
            if block.language == "text" and printed is not None:
                assert printed.rstrip() == block.code.rstrip()


def test_blocks_that_do_not_run_are_counted():
    reasons = (block.reason for page in PAGES for block in blocks(page))
    assert collections.Counter(filter(None, reasons)) == NOT_RUN


def test_the_repository_has_one_address():
    address = build.repository()  # Refuses another one in mkdocs.yml.
    owner = address.removeprefix("https://github.com/").partition("/")[0]
    for path in (*ROOT.glob("notebooks/*.ipynb"), ROOT / "CITATION.cff"):
        text = path.read_text("utf-8")
        found = re.findall(rf"https://\S*?github\S*?/{owner}/[\w-]+", text)
        assert found, path
        for one in found:
            assert one.partition(f"/{owner}/")[2] == address.rpartition("/")[2]


def test_links_out_of_the_folder_lead_to_the_repository():
    text = "[a](../LICENSE) [b](../presets#x) [c](../none.md) [d](faq.md)"
    site, wrong = build.to_repository(text, build.DOCS, "https://x/y")
    assert wrong == ["../none.md"]
    assert "(https://x/y/blob/main/LICENSE)" in site
    assert "(https://x/y/tree/main/presets#x)" in site and "(faq.md)" in site
