"""Show mkdocstrings the public names, which are not visible in the source.

Public names are loaded on first use. A stub beside a package's `__init__.py`
imports each name from the module that defines it. This extension makes each
name an alias in its package and lists it in `__all__`. Pages then refer only to
public names, wherever their code is.
"""

import ast
import contextlib
import re
from pathlib import Path

import griffe

# A paragraph that begins like a Python session.
SESSION = re.compile(r"(?m)^>>> .*(?:\n.+)*")


class PublicNames(griffe.Extension):
    """A Griffe extension that adds aliases and shows sessions as code."""

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
        # A name may equal its module's, which it then hides, as in Python.
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
