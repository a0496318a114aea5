"""Lets mkdocstrings see what the source alone does not tell it.

Public names are loaded on first use: a stub beside a package's `__init__.py`
imports each from the module that defines it. Here each becomes an alias of the
package, and `__all__` their list. Pages then name public names alone, wherever
their code lies.
"""

import ast
import contextlib
import re
from pathlib import Path

import griffe

# A paragraph that begins as a session of Python does.
SESSION = re.compile(r"(?m)^>>> .*(?:\n.+)*")


class PublicNames(griffe.Extension):
    """Adds names that are assigned, and shows sessions as code."""

    def on_module(self, *, mod, **kwargs):
        stub = Path(mod.filepath).with_suffix(".pyi")
        if not stub.exists():
            return
        places = {
            alias.name: node.module
            for node in ast.parse(stub.read_text("utf-8")).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found = {name: mod[f"{home}.{name}"] for name, home in places.items()}
        # A name may be that of its module, which it hides here as in Python.
        for name, target in found.items():
            mod.members[name] = griffe.Alias(name, target, parent=mod)
        mod.exports = list(places)

    def on_class(self, *, cls, loader, **kwargs):
        # A function of another module as a method: `save = files.save`.
        for name, member in list(cls.members.items()):
            value = getattr(member, "value", None)
            if isinstance(value, griffe.ExprAttribute):
                with contextlib.suppress(KeyError):
                    target = loader.modules_collection[value.canonical_path]
                    cls.members[name] = griffe.Alias(name, target, parent=cls)

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = re.sub("(?m)^Example:$", "**Example**", obj.docstring.value)
            obj.docstring.value = SESSION.sub(
                lambda match: f"```pycon\n{match[0]}\n```", text
            )
