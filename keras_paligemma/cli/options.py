"""Options that several commands have."""

from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="Preset name, folder, .npz file or its pieces, or a handle: "
        "hf://…, kaggle://…, gs://…"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field that the files do not tell: "
        "query_pre_attention_scalar=256. May be repeated.",
    ),
]
LoraTargets = Annotated[
    list[str] | None,
    typer.Option(help="decoder.attention, decoder, vision, all, …"),
]
Quantize = Annotated[str | None, typer.Option(help="int8 | int4")]


def read_fields(pairs):
    """Turn ["final_logit_soft_cap=none"] into a dict of numbers."""
    fields = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        try:
            words = {"none": None, "true": True, "false": False}
            value = (
                words[text.lower()] if text.lower() in words else float(text)
            )
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(
                "Expected: --set name=number, or name=none. Received: "
                f"{pair!r}."
            )
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fields[key] = value
    return fields
