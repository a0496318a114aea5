"""Run the code blocks of README and docs; `tools/docs/pages.py` reads them."""

import ast
import collections
import inspect
import re
import shlex
from pathlib import Path

import keras
import pytest
from typer.testing import CliRunner

import keras_paligemma
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import cli
from keras_paligemma import data
from keras_paligemma import sharding
from keras_paligemma import training
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tuning.adapters import Adapters
from tools.docs import build
from tools.docs.pages import PAGES
from tools.docs.pages import blocks
from tools.docs.pages import run_page

ROOT = Path(__file__).parents[1]
COMMAND = "keras-paligemma "

# Counts of blocks that are not run, by reason, so that changes are noticed.
NOT_RUN = {
    "pip needs a network": 8,
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
    "trains for hours": 1,
}


def run_commands(code):
    """Run shell lines, which must all be commands of the package."""
    for line in code.replace("\\\n", " ").splitlines():
        line = line.partition(" #")[0].strip()
        assert line.startswith(COMMAND), f"cannot run {line!r} here"
        result = CliRunner().invoke(
            cli.app, shlex.split(line)[1:], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(not b.reason for b in blocks(page))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run_page(page, run_commands)


def test_blocks_that_do_not_run_are_counted():
    reasons = (block.reason for page in PAGES for block in blocks(page))
    assert collections.Counter(filter(None, reasons)) == NOT_RUN


def test_the_repository_has_one_address():
    address = build.repository()  # Raises if mkdocs.yml differs.
    owner = address.removeprefix("https://github.com/").partition("/")[0]
    for path in (*ROOT.glob("notebooks/*.ipynb"), ROOT / "CITATION.cff"):
        text = path.read_text("utf-8")
        found = re.findall(rf"https://\S*?github\S*?/{owner}/[\w-]+", text)
        assert found, path
        for link in found:
            assert link.partition(f"/{owner}/")[2] == address.rpartition("/")[2]


def test_links_out_of_the_folder_lead_to_the_repository():
    text = "[a](../LICENSE) [b](../presets#x) [c](../none.md) [d](faq.md)"
    site, wrong = build.to_repository(text, build.DOCS, "https://x/y")
    assert wrong == ["../none.md"]
    assert "(https://x/y/blob/main/LICENSE)" in site
    assert "(https://x/y/tree/main/presets#x)" in site and "(faq.md)" in site


def test_links_of_other_pages_lead_somewhere():
    assert build.lost_links() == []
    page = ROOT / "docs" / "guides" / "ask.md"
    assert build.has_anchor(page, "#many-pictures")
    assert not build.has_anchor(page, "#no-pictures")


def test_modules_that_are_run_exist():
    """Check `python -m …` in the pages, and in docstrings and comments."""
    folders = "docs keras_paligemma benchmarks recipes presets tests".split()
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for folder in folders:
        for suffix in ("md", "py"):
            files += (ROOT / folder).rglob(f"*.{suffix}")
    own = "keras_paligemma|benchmarks|recipes|tests|tools"
    pattern = re.compile(rf"python\s+-m\s+((?:{own})(?:\.\w+)*)")
    found = {
        name
        for file in files
        for name in pattern.findall(file.read_text("utf-8"))
    }
    assert "benchmarks.quantized_format" in found
    for name in found:
        path = ROOT / name.replace(".", "/")
        module = path.with_suffix(".py"), path / "__main__.py"
        assert any(file.is_file() for file in module), name


def test_names_that_no_page_describes_are_told():
    names = build.public_names()
    assert "keras_paligemma.PaliGemmaCausalLM" in names
    assert "keras_paligemma.data.Batches" in names
    assert build.unlisted_names({*names}) == []
    missing = {*names} - {"keras_paligemma.Adam"}
    assert build.unlisted_names(missing) == [
        "docs/api: no keras_paligemma.Adam"
    ]


# What the names in the tables of calls refer to.
NAMES = {
    **{
        name: getattr(keras_paligemma, name) for name in keras_paligemma.__all__
    },
    **{
        name: getattr(PaliGemmaCausalLM, name)
        for name in dir(PaliGemmaCausalLM)
    },
    **{name: getattr(data, name) for name in data.__all__},
    **{name: getattr(sharding, name) for name in sharding.__all__},
    "model": PaliGemmaCausalLM,
    "training": training,
    "MaskCodec": MaskCodec,
    "keras": keras,
    "dict": dict,
    "unmerge": Adapters.unmerge,
    "tfds": None,  # From another library.
    # `fit` with `every=` and `keep=` is the resuming function.
    "fit": training.fit,
}


def our_calls(page):
    """Parse the calls in the columns headed "Here", as `ast.Call`."""
    column = None
    for line in page.read_text("utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) < 3:
            column = None
        elif column is None:
            names = [cell.strip() for cell in cells]
            column = names.index("Here") if "Here" in names else 0
        for code in re.findall("`([^`]+)`", cells[column] if column else ""):
            code = re.sub(r"=(?=[,)])", "=0", code.replace("…", "..."))
            try:
                tree = ast.parse(code)
            except SyntaxError:
                continue  # A command or a list of names.
            yield from (n for n in ast.walk(tree) if isinstance(n, ast.Call))


def named(function):
    """Return the function of a call, or `None` if another library has it."""
    if isinstance(function, ast.Name):
        return NAMES[function.id]
    owner = named(function.value)
    if isinstance(owner, property):
        owner = Adapters  # The type of `model.adapters`.
    return None if owner is None else getattr(owner, function.attr)


@pytest.mark.parametrize(
    "library, count",
    [("keras_hub", 6), ("transformers", 19), ("big_vision", 18)],
)
def test_calls_in_tables_exist(library, count):
    """Check calls together with their keyword arguments."""
    calls = [*our_calls(ROOT / "docs" / f"migrating_from_{library}.md")]
    assert len(calls) >= count
    for call in calls:
        found = named(call.func)
        if found in (None, dict):
            continue
        # `enable_lora` forwards options, and its docstring says to which
        # function.
        handed = getattr(PaliGemmaBackbone, found.__name__, found)
        known = {
            *inspect.signature(found).parameters,
            *inspect.signature(handed).parameters,
            *re.findall(r"\w+", found.__doc__),
        }
        assert {keyword.arg for keyword in call.keywords} <= known, ast.unparse(
            call
        )
