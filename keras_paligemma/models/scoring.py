"""The methods of `PaliGemmaCausalLM` that score and embed."""

import numpy as np
from keras import ops

from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.prefill import continued
from keras_paligemma.models.inputs import full_masks
from keras_paligemma.models.passes import batched
from keras_paligemma.models.passes import check_has_prompts
from keras_paligemma.models.passes import check_preprocessor
from keras_paligemma.models.passes import examples_of
from keras_paligemma.models.passes import parts_of
from keras_paligemma.models.passes import run_pass
from keras_paligemma.models.prefixes import continue_rows
from keras_paligemma.models.prefixes import unpacked
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.inputs import to_pictures
from keras_paligemma.preprocessing.prompt_and_response import PART_NAMES
from keras_paligemma.preprocessing.prompt_and_response import WHOLE_NAMES
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.preprocessing.prompt_and_response import split_prompt


def score(self, inputs, *, details=False, batch_size=None):
    """Return the log-likelihood of given responses.

    They are preprocessed as in `fit`, with the end token, and scored on the
    logits that `generate` uses, with the final soft cap. An answer of
    `generate` that ended has the same log-probability here.

    Args:
        inputs: dict of `images`, `prompts` and `responses`: one of each, or
            lists; or of `prefix`, from `prefill`, and `responses`.
        details: bool, whether to return an `Answer` for each, with the tokens
            of the response and their log-probabilities.
        batch_size: int, examples per batch; `None` uses one batch.

    Returns:
        float32 array (B,), natural logarithms; a float for one example. With
        `details`, an `Answer` instead of each.

    Raises:
        ValueError: if the model has no preprocessor, or `fit` would refuse the
            inputs.

    Example:

    ```python
    scores = model.score({
        "images": [cat, cat],
        "prompts": ["answer en what is it?"] * 2,
        "responses": ["cat", "dog"],
    })
    ```
    """
    check_preprocessor(self, "score")
    answers, single = [], False
    end = self.preprocessor.tokenizer.end_token_id
    prefix, inputs = unpacked(self, inputs)
    check_has_prompts(inputs, "score")
    for part, count in parts_of(inputs, batch_size):
        examples = examples_of(self, part)
        rows, single = examples.rows, examples.single
        shared = continue_rows(prefix, part, rows)
        each_BR = run_pass(self, scored, rows, shared=shared)[:count]
        for row, each_R in enumerate(each_BR):
            ids = examples.ids(row)
            [text] = self.preprocessor.generate_postprocess(
                {"token_ids": ids[None]}
            )
            answers.append(
                Answer(
                    text,
                    tuple(ids.tolist()),
                    tuple(each_R[examples.real[row]].tolist()),
                    # A response that is too long is cut, as in `fit`.
                    "stop_token" if end in ids[-1:] else "length",
                )
            )
    if details:
        return answers[0] if single else answers
    sums = np.array([answer.log_probability for answer in answers], "float32")
    return float(sums[0]) if single else sums


def encode(self, images, *, batch_size=None):
    """Encode images as image tokens once, to ask about them often.

    Args:
        images: an image or a list of images, as `generate` takes them.
        batch_size: int, images per batch; `None` uses one batch.

    Returns:
        float32 array (B, I, D), or (I, D) for one image, read-only. `generate`
        takes it as `image_embeddings` instead of `images`; those of one image
        are used for all prompts of a list.

    Example:

    ```python
    seen = model.encode(picture)
    model.generate({"image_embeddings": seen, "prompts": ["ocr", "cap en"]})
    ```
    """
    check_preprocessor(self, "encode")
    if self.preprocessor.image_converter is None:
        raise ValueError(
            "The preprocessor reads no pictures. Received: image_converter="
            "None. Expected: a preprocessor with a `PaliGemmaImageConverter`."
        )
    found = []
    images, several = to_pictures(images)
    size = len(images) if batch_size is None else batch_size
    size = to_integer(size, "batch_size")
    for first in range(0, len(images), size):
        pixels = self.preprocessor.image_converter(images[first : first + size])
        found.append(run_pass(self, encoded, {"images": pixels}))
    found = np.concatenate(found)
    found.flags.writeable = False
    return found if several else found[0]


def embed(self, inputs, *, batch_size=None):
    """Return the hidden states of images and prompts, for retrieval.

    Args:
        inputs: as `generate` takes them; or dict of `prefix`, from `prefill`,
            and `responses`.
        batch_size: int, examples per batch; `None` uses one batch.

    Returns:
        dict of float32 `hidden_states` (B, L, D) of image tokens and prompt,
        after the final norm; `image_embeddings` (B, I, D); and bool
        `padding_mask` (B, L), False on padding. Without B for one example.
        After a prefix, the L tokens are those of the response, and there are
        no `image_embeddings`.

    Example:

    ```python
    found = model.embed({"images": [cat], "prompts": ["caption en"]})
    vector = found["hidden_states"][:, -1]  # Of the prompt's last token.
    ```
    """
    check_preprocessor(self, "embed")
    parts, single = [], False
    prefix, inputs = unpacked(self, inputs)
    if prefix is not None and inputs["responses"] is None:
        raise ValueError(
            "The hidden states behind a prefix are those of responses. "
            "Received: a prefix alone. Expected: 'responses' beside it, or "
            "`prefix.last_hidden_states`."
        )
    if prefix is None and inputs.get("responses") is not None:
        raise ValueError(
            "The hidden states are those of images and prompts. Received: "
            "'responses'. Expected: none; or `prefill`, and 'responses' behind "
            "its prefix."
        )
    for part, count in parts_of(inputs, batch_size):
        arrays = self.preprocessor.generate_preprocess(part)
        single = arrays["token_ids"].ndim == 1
        rows = batched(arrays, single)
        if prefix is None:
            rows = prompts_alone(rows)
        else:
            start = self.preprocessor.prompt_length
            for name in WHOLE_NAMES:
                rows[name] = rows[name][:, start:]
        shared = continue_rows(prefix, part, rows)
        of_part = run_pass(self, embedded, rows, shared=shared)
        parts.append({name: array[:count] for name, array in of_part.items()})
    found = {
        name: np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }
    return (
        {name: array[0] for name, array in found.items()} if single else found
    )


def prompts_alone(rows):
    """Return the arrays of whole texts without the columns of responses."""
    rows = split_prompt(rows, rows["token_ids"].shape[1])
    rows.pop("response_ids")
    if rows.pop("response_mask").any():
        raise ValueError(
            "The hidden states are those of images and prompts. Received: "
            "arrays with a begun answer. Expected: none."
        )
    ids, valid = rows.pop("prompt_ids"), rows.pop("prompt_mask")
    whole = zip(WHOLE_NAMES, (ids, valid, np.zeros_like(valid)), strict=True)
    return rows | dict(whole)


def scored(model, plan, rows, prefix=None):
    """Return the log-probabilities (B, R) of responses; 0 on padding.

    The head is applied to one position at a time: all logits would be (B, R,
    V).
    """
    text = PromptAndResponse(**{name: rows[name] for name in PART_NAMES})
    if prefix is None:
        hidden_BRD = text.predicting(model.backbone(rows))
    else:
        response = text.response_ids, text.response_mask
        hidden_BRD = continued(
            model.backbone, prefix, rows["prefix_row"], *response
        )[:, :-1]
    hidden_RBD = ops.swapaxes(hidden_BRD, 0, 1)

    def place(hidden_and_targets):
        hidden_BD, target_B = hidden_and_targets
        log_BV = ops.log_softmax(model.backbone.logits(hidden_BD), axis=-1)
        return ops.take_along_axis(log_BV, target_B[:, None], axis=1)[:, 0]

    targets_RB = ops.swapaxes(text.response_ids, 0, 1)
    each_RB = ops.map(place, (hidden_RBD, targets_RB))
    return ops.where(text.response_mask, ops.swapaxes(each_RB, 0, 1), 0.0)


def encoded(model, plan, rows):
    """Return the image tokens in float32."""
    return ops.cast(model.backbone.encode_images(rows["images"]), "float32")


def embedded(model, plan, rows, prefix=None):
    """Return the hidden states of a prompt, or of responses to a prefix."""
    backbone = model.backbone
    rows = dict(rows)
    if prefix is not None:
        response = rows["token_ids"], rows["padding_mask"]
        hidden_BRD = continued(backbone, prefix, rows["prefix_row"], *response)
        return {
            "hidden_states": ops.cast(hidden_BRD[:, 1:], "float32"),
            "padding_mask": rows["padding_mask"],
        }
    if rows.get("images") is not None:
        rows["image_embeddings"] = backbone.encode_images(rows.pop("images"))
    hidden_BLD = backbone(rows)
    images = hidden_BLD.shape[1] - rows["token_ids"].shape[1]
    valid_BL, _ = full_masks(rows, images)
    found = {
        "hidden_states": ops.cast(hidden_BLD, "float32"),
        "padding_mask": valid_BL,
    }
    if "image_embeddings" in rows:
        found["image_embeddings"] = ops.cast(
            rows["image_embeddings"], "float32"
        )
    return found
