"""The attention of responses to pictures, for visualisation."""

from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_paligemma.generation.texts import texts_of
from keras_paligemma.layers.attention import MASKED
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.attention import mask_of_block
from keras_paligemma.layers.attention import rotate
from keras_paligemma.layers.attention import soft_cap
from keras_paligemma.layers.attention import token_positions
from keras_paligemma.models.inputs import full_masks
from keras_paligemma.models.passes import check_has_prompts
from keras_paligemma.models.passes import check_preprocessor
from keras_paligemma.models.passes import examples_of
from keras_paligemma.models.passes import parts_of
from keras_paligemma.models.passes import run_pass
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.tasks.picture_attention import PictureAttention

AXES = ("layers", "heads")


@dataclass(frozen=True)
class Averages:
    """Compile-time parameters of the program: axes of the weights to average.

    Args:
        layers, heads: bool.
    """

    layers: bool
    heads: bool


def attention(self, inputs, *, average=AXES, batch_size=None):
    """Return how much each token of a response attends to the picture.

    To explain an answer, generate it first and pass it as the response. A
    separate forward pass computes plain attention for the positions that
    predict the response; other methods do not become slower.

    Args:
        inputs: dict of `images`, `prompts` and `responses`, as `score` takes
            it.
        average: strs of "layers" and "heads", the axes to average. With `()`
            the array has both axes: 13.6 MB for 64 tokens of a 3b at 224
            pixels.
        batch_size: int, examples per batch; `None` uses one batch.

    Returns:
        A `tasks.picture_attention.PictureAttention` for each example, in a
        list; for one example the object itself.

    Raises:
        ValueError: if the model has no preprocessor, the example no picture,
            `average` names another axis, or `fit` would refuse the inputs.

    Example:

    ```python
    asked = {"images": cat, "prompts": "caption en"}
    seen = model.attention(asked | {"responses": model.generate(asked)})
    seen.overlay("cat").save("cat_seen.png")
    ```
    """
    check_preprocessor(self, "attention")
    check_has_prompts(inputs, "attention")
    average = (average,) if isinstance(average, str) else tuple(average)
    if not set(average) <= set(AXES):
        raise ValueError(
            f"Unknown axes to average. Expected: of {AXES}. Received: "
            f"average={average}."
        )
    plan = Averages(*(axis in average for axis in AXES))
    found, single = [], False
    for part, count in parts_of(inputs, batch_size):
        examples = examples_of(self, part)
        rows, single = examples.rows, examples.single
        if rows.keys().isdisjoint({"images", "image_embeddings"}):
            raise ValueError(
                "Without a picture there is no attention to it. Received: "
                f"{sorted(part)}. Expected: 'images' or 'image_embeddings'."
            )
        shares = run_pass(self, attended, rows, plan)[:count]
        pictures = part.get("images")
        if pictures is None or single:
            pictures = [pictures] * len(shares)
        pictures = [*pictures]  # A column may have labels, not positions.
        for row, each in enumerate(shares):
            ids = examples.ids(row).tolist()
            each = each[: len(ids)]
            each.flags.writeable = False
            tokens = texts_of(self.preprocessor.tokenizer, ids)
            found.append(PictureAttention(tuple(tokens), each, pictures[row]))
    return found[0] if single else found


def attended(model, plan, rows):
    """Return the attention of the response to the picture.

    Returns:
        float32 tensor (B, R, [layers], [heads], [pictures], rows, columns).
    """
    backbone = model.backbone
    text: Any = PromptAndResponse.among(rows)
    inputs = {**rows, **text.whole()}
    x_BLD = backbone.embed(inputs)
    images = x_BLD.shape[1] - inputs["token_ids"].shape[1]
    # `mask_of` may return a mask for a kernel that returns no weights.
    valid_BL, response_BL = full_masks(inputs, images)
    arguments = backbone.text_decoder.arguments_of_blocks(
        attention_mask(valid_BL, response_BL), token_positions(valid_BL)
    )
    queries = slice(-text.response_length - 1, -1)

    def observed(block, number, x_BLD, mask_BLL, angles, near_mask_BLL=None):
        if near_mask_BLL is not None:
            mask_BLL = mask_of_block(number, mask_BLL, near_mask_BLL)
        weights_BNRL = _weights(block, x_BLD, mask_BLL, angles, queries)
        weights_BNRI = weights_BNRL[..., :images]
        if plan.heads:
            return ops.mean(weights_BNRI, axis=1)
        return ops.moveaxis(weights_BNRI, 1, 2)

    # Layers are the first axis here; in the result they follow the tokens.
    shares = backbone.text_decoder.blocks.observe(observed, x_BLD, *arguments)
    shares = ops.mean(shares, 0) if plan.layers else ops.moveaxis(shares, 0, 2)
    side = backbone.image_size // backbone.vision_config.patch_size
    pictures = (images // side**2,) if images > side**2 else ()
    return ops.reshape(shares, (*shares.shape[:-1], *pictures, side, side))


def _weights(block, x_BLD, mask_BLL, angles, queries):
    """Return the attention weights (B, N, R, L) of some tokens of a block."""
    layer = block.attention
    y_BLD = block.pre_attention_norm(x_BLD)
    query_BRNH = rotate(
        layer.query(y_BLD[:, queries]), [table[:, queries] for table in angles]
    )
    key_BLKH = ops.cast(rotate(layer.key(y_BLD), angles), "float32")
    query_BRNH = query_BRNH * ops.cast(layer.query_scale, query_BRNH.dtype)
    groups = query_BRNH.shape[2] // key_BLKH.shape[2]
    logits_BNRL = ops.einsum(
        "brnh,blnh->bnrl",
        ops.cast(query_BRNH, "float32"),
        ops.repeat(key_BLKH, groups, axis=2),
    )
    logits_BNRL = soft_cap(logits_BNRL, layer.logit_soft_cap)
    mask_BRL = mask_BLL[:, queries]
    return ops.softmax(ops.where(mask_BRL[:, None], logits_BNRL, MASKED))
