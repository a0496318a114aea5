"""Lets mkdocstrings see what the source alone does not tell it.

Public names are loaded on first use: a package names them in a dictionary,
`_HOME`, of name to the module that defines it. Griffe reads source and would
find none, so each becomes an alias of the package, and `__all__` their list.
Pages then name public names alone, wherever their code lies.
"""

import ast
import contextlib
import re

import griffe

# A paragraph that begins as a session of Python does.
SESSION = re.compile(r"(?m)^>>> .*(?:\n.+)*")


class PublicNames(griffe.Extension):
    """Adds names that are assigned, and shows sessions as code."""

    def on_module(self, *, mod, **kwargs):
        home = mod.members.get("_HOME")
        if home is None or home.is_alias:
            return
        places = ast.literal_eval(str(home.value))
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
