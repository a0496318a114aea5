"""What a type checker sees of the public names."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "keras_paligemma"


def public_names():
    """List (package, module, name) of all stubs, as paths and a str."""
    return [
        (stub.parent, node.module, alias.name)
        for stub in sorted(PACKAGE.rglob("__init__.pyi"))
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def public_functions(definition):
    """List a function, or the methods of a class that users call."""
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
    """List the arguments that lack a type, and "return" if that does."""
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
    "package, module, name",
    public_names(),
    ids=[name for _, _, name in public_names()],
)
def test_public_signatures_are_annotated(package, module, name):
    source = (package / (module.replace(".", "/") + ".py")).read_text("utf-8")
    (definition,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and node.name == name
    ]
    assert {
        function.name: missing
        for function in public_functions(definition)
        if (missing := without_annotation(function))
    } == {}


def test_public_names_resolve_in_a_type_checker(tmp_path):
    assert (PACKAGE / "py.typed").exists()
    names = []
    lines = []
    for package, _, name in public_names():
        dotted = ".".join(package.relative_to(ROOT).parts)
        names.append(f"{dotted}.{name}")
        lines += [f"from {dotted} import {name}", f"reveal_type({name})"]
    (tmp_path / "names.py").write_text("\n".join(lines))
    # As an editor does, Keras's classes are read from its sources.
    config = {"extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    result = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson"]
        + ["--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )
    found = json.loads(result.stdout)["generalDiagnostics"]
    revealed = [
        one["message"] for one in found if one["severity"] == "information"
    ]
    assert [one for one in found if one["severity"] == "error"] == []
    assert len(revealed) == len(names)
    types = [message.split(' is "', 1)[1] for message in revealed]
    assert {
        name: kind
        for name, kind in zip(names, types, strict=True)
        if "Unknown" in kind or kind == 'Any"'
    } == {}
