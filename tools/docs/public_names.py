"""Show mkdocstrings the public names, which are not visible in the source.

Public names are loaded on first use. A stub beside a package's `__init__.py`
imports each name from the module that defines it. This extension makes each
name an alias in its package and lists it in `__all__`. Pages then refer only to
public names, wherever their code is.
"""

import ast
import contextlib
import re
import textwrap
from pathlib import Path

import griffe

CHECKED = Path(__file__).parents[2] / "keras_paligemma" / "checked.py"
# The place of the default among the arguments of a function that makes a field.
DEFAULTS = {
    function.name: names.index("default")
    for function in ast.parse(CHECKED.read_text("utf-8")).body
    if isinstance(function, ast.FunctionDef)
    and "default" in (names := [arg.arg for arg in function.args.args])
}
# A heading and the indented lines right below it, if any.
EXAMPLE = re.compile(r"(?m)^Example:\n((?: +.+\n?)*)")
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

    def on_attribute_instance(self, *, attr, **kwargs):
        # A field that is checked shows its default, not how it is made.
        call = attr.value
        if not isinstance(call, griffe.ExprCall):
            return
        module, _, name = call.canonical_path.rpartition(".")
        if module == "keras_paligemma.checked" and name in DEFAULTS:
            attr.value = next(iter(call.arguments[DEFAULTS[name] :]), None)

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = EXAMPLE.sub(
                lambda match: f"**Example**\n\n{textwrap.dedent(match[1])}",
                obj.docstring.value,
            )
            obj.docstring.value = SESSION.sub(
                lambda match: f"```pycon\n{match[0]}\n```", text
            )
