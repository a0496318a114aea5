"""Options of several commands, and options made from a dataclass."""

import dataclasses
import functools
import inspect
import re
import tomllib
from collections.abc import Callable
from typing import Annotated
from typing import Any
from typing import get_origin

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="Preset name, folder, .npz file or its pieces, or a handle: "
        "hf://…, kaggle://…, gs://…"
    ),
]
Preset = Annotated[str, typer.Option(help="As `from_preset` takes it")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A configuration field that the files lack: "
        "query_pre_attention_scalar=256. May be repeated.",
    ),
]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option(help="decoder.attention, decoder, vision, all, …"),
]
Adapter = Annotated[str | None, typer.Option(help="Folder of a PEFT adapter")]
Quantize = Annotated[str | None, typer.Option(help="int8 | int4")]
CacheDtype = Annotated[
    str | None, typer.Option(help="Of keys and values: int8")
]
Dtype = Annotated[
    str | None, typer.Option(help="Dtype policy; default: the source's")
]
Masks = Annotated[
    str | None,
    typer.Option(
        help="Codec of RefCOCO's masks, path or handle of vae-oid.npz, which "
        "models of published sizes need; default: the embedded one"
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(
        help="Mask codec, path or handle of vae-oid.npz, which models of "
        "published sizes need; default: the codec of the nano preset"
    ),
]
MultiHost = Annotated[
    bool,
    typer.Option(
        "--multi-host",
        help="Run on several hosts: each runs this command and can access "
        "--output. They connect by Keras's variables KERAS_DISTRIBUTION_…; "
        "hosts of a TPU need none",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not `None`: others keep their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def with_settings(cls: type) -> Callable:
    """Return a decorator that adds an option for each field of a dataclass.

    A setting's name, type, default and help are defined only in the dataclass
    and its docstring.

    Args:
        cls: dataclass of strings, numbers, flags and tuples of strings, whose
            docstring lists its fields under "Args:".

    Returns:
        Decorator of a command whose first argument is `given`, a dict of the
        fields that the user gave, followed by other options.
    """
    fields = dataclasses.fields(cls)
    meanings = _meanings(cls)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                (list[str] if get_origin(field.type) is tuple else field.type)
                | None,
                typer.Option(
                    help=meanings[field.name], show_default=_shown(field)
                ),
            ],
        )
        for field in fields
    ]

    def decorate(command):
        signature = inspect.signature(command)
        others = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name != "given"
        ]

        @functools.wraps(command)
        def run(**values):
            settings = {field.name: values.pop(field.name) for field in fields}
            return command(given(**settings), **values)

        # Read by `inspect`, but not declared for functions.
        run.__signature__ = signature.replace(  # pyright: ignore[reportAttributeAccessIssue]
            parameters=[*others, *options]
        )
        run.__annotations__ = {
            option.name: option.annotation for option in [*others, *options]
        }
        return run

    return decorate


def _meanings(cls):
    """Return each field's help, from "name: type, help." in the docstring."""
    text = inspect.getdoc(cls) or ""
    text = text.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(
        r"^    (\w+): \w+, (.*(?:\n     .*)*)", text, re.MULTILINE
    )
    sentences = {name: " ".join(words.split()) for name, words in found}
    return {
        name: s[:1].upper() + s[1:].rstrip(".") for name, s in sentences.items()
    }


def _shown(field):
    """Return the default as help shows it, or `False` for none."""
    value = field.default
    if not isinstance(value, (int, float, str, tuple)) or value is False:
        return False
    return " ".join(value) if isinstance(value, tuple) else str(value)


def read_codec(source: str | None) -> Any:
    """Return the `MaskCodec` of a path or handle; `None` if none is given."""
    if source is None:
        return None
    from keras_paligemma.tasks.published_codecs import load_codec

    return load_codec(source)


def read_fields(pairs: list[str] | None) -> dict:
    """Parse pairs such as "final_logit_soft_cap=none".

    Args:
        pairs: list of str, NAME=VALUE, or `None`.

    Returns:
        dict of names to values, which are parsed as TOML; "none" is `None`.

    Raises:
        ValueError: a pair is not NAME=VALUE.
    """
    fields = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        try:
            # TOML has no null.
            nothing = value.strip().lower() == "none"
            fields |= {name: None} if nothing else tomllib.loads(pair)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(
                "Expected: --set name=number, or name=none. Received: "
                f"{pair!r} ({error})."
            ) from error
    return fields
