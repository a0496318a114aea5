"""Build the documentation site into build/site: `make docs`.

Pages in `docs` are also read on GitHub, where they link to files outside of
that folder, such as `../notebooks/x.ipynb`. The site is therefore built from a
copy in which such links lead to the repository. Nothing is downloaded. The
build fails on any warning: broken links, names without a documented object,
arguments that a signature lacks, public names that no page lists, and pages
that load resources from other sites. The workflow `.github/workflows/docs.yml`
checks links to other sites.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS, BUILD = ROOT / "docs", ROOT / "build"
PAGES, SITE = BUILD / "pages", BUILD / "site"
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
# Resources that a browser would load from another site with the page.
REMOTE = re.compile(r'<(?:link|script|img)\b[^>]*\b(?:href|src)="https?://')


def main():
    """Build the site and print its problems."""
    problems = copy_pages(repository()) + lost_links()
    warnings = build()
    # The pages of an incomplete site are not checked.
    problems += warnings or remote_parts() + unlisted_names(listed_names())
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(f"{len(problems)} warnings, see above")
    print(f"built {SITE.relative_to(ROOT)}")


def repository():
    """Return the repository's address, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    address = project["project"]["urls"]["Repository"]
    if f"repo_url: {address}\n" not in (ROOT / "mkdocs.yml").read_text("utf-8"):
        raise SystemExit(f"mkdocs.yml has another repo_url than {address}")
    return address


def copy_pages(address):
    """Copy `docs` to `PAGES`; return a list of broken links."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(DOCS, PAGES, ignore=shutil.ignore_patterns("*.py"))
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    (PAGES / "changelog.md").write_text(changelog.replace("](docs/", "]("))
    problems = []
    for page in PAGES.rglob("*.md"):
        name = page.relative_to(PAGES)
        text = page.read_text("utf-8")
        text, wrong = to_repository(text, (DOCS / name).parent, address)
        page.write_text(text, "utf-8")
        problems += [f"{name}: no {link}" for link in wrong]
    return problems


def to_repository(text, folder, address):
    """Convert links to files outside of `docs` to links to the repository.

    Args:
        text: str, a page.
        folder: path, the folder that the page's links are relative to.
        address: str, the repository's address.

    Returns:
        The page, and a list of the broken links.
    """
    wrong = []

    def resolve(match):
        target = Path(os.path.normpath(folder / match["path"]))
        if target.is_relative_to(DOCS):
            return match[0]  # The builder checks it.
        if not target.exists():
            wrong.append(match["path"])
        kind = "tree" if target.is_dir() else "blob"
        place = os.path.relpath(target, ROOT)
        return f"{address}/{kind}/main/{place}{match['anchor'] or ''}"

    return LINK.sub(resolve, text), wrong


def lost_links():
    """List broken links of README and other pages outside the site."""
    problems = []
    for page in (*ROOT.glob("*.md"), ROOT / "examples" / "README.md"):
        for match in LINK.finditer(page.read_text("utf-8")):
            target = page.parent / match["path"]
            if not target.exists() or not has_anchor(target, match["anchor"]):
                problems.append(f"{page.name}: no {match[0]}")
    return problems


def has_anchor(page, anchor):
    """Return whether a page has the heading that a link refers to.

    GitHub's anchors are lower-case headings with hyphens instead of spaces.
    """
    if not anchor or page.suffix != ".md":
        return True
    headings = re.findall(r"(?m)^#+ +(.+)$", page.read_text("utf-8"))
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return anchor[1:] in {"-".join(heading.split()) for heading in kept}


def build():
    """Run the builder and list its warnings."""
    shutil.rmtree(SITE, ignore_errors=True)
    # Its cache tracks pages, but not the docstrings that they show.
    command = [sys.executable, "-m", "zensical", "build", "--clean"]
    result = subprocess.run(
        [*command, "--strict"], cwd=ROOT, text=True, capture_output=True
    )
    told = re.sub(r"\x1b\[[\d;]*m", "", result.stdout + result.stderr)
    warned = re.search("(?im)^(griffe:|warning:|error:)", told)
    return [told] if result.returncode or warned else []


def public_names():
    """List the public names, which stubs beside `__init__.py` import."""
    return [
        ".".join([*stub.parent.relative_to(ROOT).parts, alias.name])
        for stub in sorted((ROOT / "keras_paligemma").rglob("__init__.pyi"))
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def listed_names():
    """Read the names that the site describes, from its Sphinx inventory."""
    inventory = (SITE / "objects.inv").read_bytes()
    lines = zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode()
    return {line.split()[0] for line in lines.splitlines()}


def unlisted_names(listed):
    """List public names that no page of the API describes."""
    return [
        f"docs/api: no {name}" for name in public_names() if name not in listed
    ]


def remote_parts():
    """List pages that load a script, style or picture from elsewhere."""
    return [
        f"{page.relative_to(SITE)} loads {match[0]}"
        for page in sorted(SITE.rglob("*.html"))
        for match in REMOTE.finditer(page.read_text("utf-8"))
        if 'rel="canonical"' not in match[0]
    ]


if __name__ == "__main__":
    main()
