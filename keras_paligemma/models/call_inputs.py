"""Validation of what a model is called with: names and shapes of arrays."""

import numpy as np

from keras_paligemma.models.inputs import DTYPES
from keras_paligemma.models.inputs import check_images
from keras_paligemma.models.inputs import typed
from keras_paligemma.preprocessing.prompt_and_response import PART_NAMES

NAMES = {*DTYPES, "images", "image_embeddings"}


def call_inputs(inputs, backbone):
    """Validate the inputs of a call, and return them with their dtypes.

    A misspelt name would be ignored, and a mask or positions of one row or
    column would apply to all of them. Sizes that are not known yet, as in a
    graph, fit all.

    Args:
        inputs: dict as `PaliGemmaBackbone` takes it.
        backbone: `PaliGemmaBackbone`.

    Returns:
        dict, see `inputs.typed`.

    Raises:
        ValueError: an unknown or missing name, or shapes that do not fit.
    """
    if not isinstance(inputs, dict):
        raise ValueError(
            "A model takes a dictionary of arrays. Received: "
            f"{type(inputs).__name__}. Expected: 'token_ids', 'padding_mask', "
            "… by name."
        )
    shapes = {
        name: tuple(np.shape(array))
        for name, array in inputs.items()
        if array is not None
    }
    in_parts = shapes.keys() >= {*PART_NAMES}
    is_whole = shapes.keys() >= {"token_ids", "padding_mask"}
    if shapes.keys() - NAMES or not (in_parts or is_whole):
        raise ValueError(
            "These are not the arrays of a call. Expected: 'token_ids' and "
            "'padding_mask', or the four of `PromptAndResponse`; with 'images' "
            "or 'image_embeddings' where there are any, and 'response_mask', "
            "'attention_mask' or 'positions' if needed. Received: "
            f"{list(inputs)}."
        )
    ids = ("prompt_ids", "response_ids") if in_parts else ("token_ids",)
    for name in ids:
        if len(shapes[name]) != 2:
            raise ValueError(
                f"`{name}` has an unknown shape. Received: {shapes[name]}. "
                "Expected: (batch, tokens)."
            )
    if "images" in shapes:
        check_images(inputs["images"], backbone.image_size)
    rows = shapes[ids[0]][0]
    _, tokens, width = backbone.compute_output_shape(shapes)
    expected = {
        "padding_mask": shapes.get("token_ids"),
        "prompt_mask": shapes[ids[0]],
        "response_ids": (rows, None),
        "response_mask": shapes[ids[-1]],
        "images": (rows, *shapes.get("images", ())[1:]),
        "image_embeddings": (rows, None, width),
        "attention_mask": (rows, tokens, tokens),
        "positions": (rows, tokens),
    }
    for name in expected.keys() & shapes.keys():
        if not _fits(shapes[name], expected[name]):
            known = [
                given if size is None else size
                for given, size in zip(
                    shapes[name], expected[name], strict=False
                )
            ]
            raise ValueError(
                f"`{name}` does not fit the token ids. Received: "
                f"{shapes[name]}. Expected: {tuple(known)}."
            )
    return typed(inputs, backbone.vocabulary_size)


def _fits(shape, expected):
    """Return whether shapes are equal where both are known."""
    return len(shape) == len(expected) and all(
        None in (size, wanted) or size == wanted
        for size, wanted in zip(shape, expected, strict=True)
    )
