"""Types of the public names, as type checkers see them."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_paligemma"

# Modules that are public themselves (see docs/stability.md), or whose names
# public names return.
MODULES = [
    *sorted((PACKAGE / "tasks").glob("[!_]*.py")),
    *(PACKAGE / name for name in ("config.py", "lora_config.py", "presets.py")),
]


def public_names():
    """List (package, module, name) of all stubs: two paths and a str."""
    return [
        (stub.parent, node.module, alias.name)
        for stub in sorted(PACKAGE.rglob("__init__.pyi"))
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def public_definitions():
    """List (file, name) of public functions and classes."""
    found = {
        (package / (module.replace(".", "/") + ".py"), name)
        for package, module, name in public_names()
    }
    for file in MODULES:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add((file, node.name))
    return sorted(entry for entry in found if not entry[1].startswith("_"))


def public_functions(definition):
    """List a function itself, or the methods of a class that users call."""
    if isinstance(definition, ast.FunctionDef):
        return [definition]
    return [
        method
        for method in definition.body
        if isinstance(method, ast.FunctionDef)
        and (
            not method.name.startswith("_")
            or method.name in ("__init__", "__call__")
        )
    ]


def without_annotation(function):
    """List the arguments without a type, and "return" if it has none."""
    arguments = function.args
    listed = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    missing = [
        argument.arg
        for argument in listed
        if argument is not None
        and argument.arg not in ("self", "cls")
        and argument.annotation is None
    ]
    return missing + ["return"] * (function.returns is None)


@pytest.mark.parametrize(
    "file, name",
    public_definitions(),
    ids=[f"{file.stem}.{name}" for file, name in public_definitions()],
)
def test_public_signatures_are_annotated(file, name):
    # Overloads have the same name.
    definitions = [
        node
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and node.name == name
    ]
    assert definitions
    assert {
        function.name: missing
        for definition in definitions
        for function in public_functions(definition)
        if (missing := without_annotation(function))
    } == {}


# Keras's classes are read from its sources, as in an editor.
def pyright(folder):
    """List the types that pyright reveals in names.py, and its errors."""
    config = {"extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    output = run_checker(
        ["pyright", "--outputjson", "--pythonpath", sys.executable], folder
    )
    found = json.loads(output)["generalDiagnostics"]
    revealed = [
        error["message"].split(' is "', 1)[1].removesuffix('"')
        for error in found
        if error["severity"] == "information"
    ]
    return revealed, [error for error in found if error["severity"] == "error"]


# Other packages are excluded, since their sources take most of a minute.
def mypy(folder):
    """List the types that mypy reveals in names.py, and its errors."""
    config = """
        [mypy]
        follow_imports = skip
        ignore_missing_imports = True
        [mypy-keras_paligemma.*]
        follow_imports = silent
    """
    (folder / "mypy.ini").write_text(textwrap.dedent(config))
    lines = run_checker(
        ["mypy", "--cache-dir", os.devnull, "--no-pretty", "names.py"], folder
    ).splitlines()
    revealed = [
        line.split(' is "', 1)[1].removesuffix('"')
        for line in lines
        if " note: Revealed type is " in line
    ]
    return revealed, [line for line in lines if " error: " in line]


def run_checker(arguments, folder):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ
        | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "MYPYPATH": str(ROOT)},
    ).stdout


@pytest.mark.parametrize("checker", [pyright, mypy])
def test_public_names_resolve_in_a_type_checker(checker, tmp_path):
    names, lines = [], []
    for package, _, name in public_names():
        dotted = ".".join(package.relative_to(ROOT).parts)
        names.append(f"{dotted}.{name}")
        lines += [f"from {dotted} import {name}", f"reveal_type({name})"]
    (tmp_path / "names.py").write_text("\n".join(lines))
    revealed, errors = checker(tmp_path)
    assert errors == []
    assert {
        name: kind
        for name, kind in zip(names, revealed, strict=True)
        if "Unknown" in kind or kind == "Any"
    } == {}
