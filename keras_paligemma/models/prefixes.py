"""Pictures and prompts that are run once and continued many times."""

import keras
import numpy as np

from keras_paligemma.generation.prefill import prefill as run_prompts
from keras_paligemma.generation.prefix import Prefix
from keras_paligemma.models.passes import batched
from keras_paligemma.models.passes import check_has_prompts
from keras_paligemma.models.passes import check_preprocessor
from keras_paligemma.models.passes import run_on_device
from keras_paligemma.preprocessing.inputs import check_dictionary
from keras_paligemma.preprocessing.inputs import prompt_text
from keras_paligemma.preprocessing.inputs import to_strings


def prefill(self, inputs):
    """Run pictures and prompts once, to continue them many times.

    Use it for many responses or samples of one prompt, and for models that
    read PaliGemma's keys and values, such as a robot's policy. To ask different
    questions about a picture, `encode` it: a prompt is part of the prefix.

    Args:
        inputs: dict of `images` or `image_embeddings`, and `prompts`, as
            `generate` takes them, all at once and without `responses`.

    Returns:
        `keras_paligemma.generation.prefix.Prefix`, on the device. `generate`
        and `stream` take `{"prefix": prefix}`; `score` and `embed` take it
        together with `responses`. A prefix of one example is continued by any
        number of responses, a prefix of several by one response each.

    Raises:
        ValueError: if the model has no preprocessor, or inputs are invalid.

    Example:

    ```python
    prefix = model.prefill({"images": cat, "prompts": "caption en"})
    captions = model.generate({"prefix": prefix}, num_samples=4)
    scores = model.score({"prefix": prefix, "responses": captions})
    ```
    """
    check_preprocessor(self, "prefill")
    check_has_prompts(inputs, "prefill")
    if inputs.get("responses") is not None:
        raise ValueError(
            "A prefix ends with the prompt. Received: 'responses'. Expected: "
            "pictures and prompts; pass responses beside the prefix."
        )
    arrays = self.preprocessor.generate_preprocess(inputs)
    prompts, several = to_strings(inputs["prompts"], "prompts")
    rows = batched(arrays, not several)
    length = self.preprocessor.prompt_length
    rows["prompt_ids"] = rows.pop("token_ids")[:, :length]
    rows["prompt_mask"] = rows.pop("padding_mask")[:, :length]
    del rows["response_mask"]
    found, _ = run_on_device(self, prefilled, rows)
    count = len(prompts)
    found = keras.tree.map_structure(
        lambda array: array if array.shape[0] == count else array[:count], found
    )
    return Prefix(
        *found, prompts=tuple(map(prompt_text, prompts)), single=not several
    )


def prefilled(model, plan, rows):
    """Return cache, mask, positions and last hidden states of prompts."""
    # A response of one token needs no room: it is not fed back.
    hidden_BPD, cache = run_prompts(model.backbone, rows, 1)
    return (
        cache["layers"],
        cache["valid"],
        cache["positions"],
        hidden_BPD[:, -1],
    )


def unpacked(model, inputs):
    """Separate a prefix from a user's inputs.

    Args:
        model: `PaliGemmaCausalLM`.
        inputs: dict, as `generate` takes it.

    Returns:
        prefix: `Prefix` or `None`.
        inputs: dict without it: its prompts, without pictures, the responses,
            and `prefix_row`, the row of the prefix that each continues.

    Raises:
        ValueError: if the prefix comes with other inputs than responses,
            their numbers differ, or it is of a model of other sizes.
    """
    check_dictionary(inputs)
    prefix = inputs.get("prefix")
    if prefix is None:
        return None, inputs
    if not isinstance(prefix, Prefix) or inputs.keys() - {
        "prefix",
        "responses",
    }:
        raise ValueError(
            "A prefix holds pictures and prompts. Expected: 'prefix', which "
            "`model.prefill` returned, alone or with 'responses'. Received: "
            f"keys {sorted(inputs)}, a prefix of type {type(prefix).__name__}."
        )
    _check_sizes(prefix, model.backbone)
    responses, count = inputs.get("responses"), len(prefix)
    single = prefix.single
    if responses is not None:
        strings, several = to_strings(responses, "responses")
        single = not several
        if len(prefix) not in (1, len(strings)):
            raise ValueError(
                "Prefix and responses do not match. Expected: one response a "
                f"prompt, {len(prefix)}, or a prefix of one prompt. Received: "
                f"{len(strings)} responses."
            )
        count = len(strings)
    row = np.arange(count, dtype="int32") % len(prefix)
    prompts = [prefix.prompts[index] for index in row]
    return prefix, {
        "images": None,
        "prompts": prompts[0] if single else prompts,
        "responses": responses,
        "prefix_row": row[0] if single else row,
    }


def _check_sizes(prefix, backbone):
    """Raise on a prefix of a model of other sizes, or of the other form."""
    heads, head_dim = keras.tree.flatten(prefix.cache)[0].shape[-2:]
    received = {
        "num_layers": prefix.num_layers,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "hidden_dim": prefix.last_hidden_states.shape[-1],
    }
    wanted = {name: getattr(backbone.text_config, name) for name in received}
    received["scanned"] = not isinstance(prefix.cache, list)
    wanted["scanned"] = backbone.text_decoder.blocks.scanned
    if received != wanted:
        raise ValueError(
            "The prefix is of another model. Received: a prefix with "
            f"{received}. Expected: {wanted}, as `prefill` of this model "
            "returns it."
        )


def continue_rows(prefix, inputs, rows):
    """Add the rows that continue a prefix, and return the prefix's arrays.

    Args:
        prefix: `Prefix` or `None`.
        inputs: dict of `unpacked`, or a batch of it.
        rows: dict of arrays (B, …), changed in place.

    Returns:
        dict of arrays; `None` without a prefix.
    """
    if prefix is None:
        return None
    rows["prefix_row"] = np.atleast_1d(np.asarray(inputs["prefix_row"]))
    return prefix.arrays()
