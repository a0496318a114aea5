"""The names of big_vision, where PaliGemma comes from (`.npz` files)."""

from dataclasses import replace

from keras_paligemma.checkpoints.engine import Row

ENCODER = "img/Transformer/encoderblock/"
ATTENTION = ENCODER + "MultiHeadDotProductAttention_0/"
DECODER = "llm/layers/"
HEADS_FIRST = "n d h -> d n h"


def rows(use_post_norms=True, prefix="params/", scanned=True):
    """List the rows of the format.

    Args:
        use_post_norms: bool, `False` for PaliGemma 1.
        prefix: str before each key, "params/" or "".
        scanned: bool, the vision blocks are stacked; `False` where each has
            keys of its own, "encoderblock_0/…".

    Returns:
        List of `Row`.

    Source: big_vision, `models/proj/paligemma/paligemma.py`,
        `models/vit.py` and `models/ppp/gemma.py`.
    """
    table = [
        Row(
            "vision_encoder/position_embedding",
            "img/pos_embedding",
            axes="1 i d -> i d",
        ),
        *_pair("patch_embedding", "img/embedding/"),
        *_pair("projector", "img/head/"),
        *_norm("final_norm", "img/Transformer/encoder_norm/"),
        *_norm("blocks/attention_norm", ENCODER + "LayerNorm_0/"),
        *_norm("blocks/mlp_norm", ENCODER + "LayerNorm_1/"),
        *_pair("blocks/attention/query", ATTENTION + "query/"),
        *_pair("blocks/attention/key", ATTENTION + "key/"),
        *_pair("blocks/attention/value", ATTENTION + "value/"),
        *_pair("blocks/attention/output", ATTENTION + "out/"),
        *_pair("blocks/mlp/up", ENCODER + "MlpBlock_0/Dense_0/"),
        *_pair("blocks/mlp/down", ENCODER + "MlpBlock_0/Dense_1/"),
        _text("token_embedding/table", "llm/embedder/input_embedding"),
        _text("final_norm/scale", "llm/final_norm/scale"),
        _text(
            "blocks/attention/query/kernel",
            DECODER + "attn/q_einsum/w",
            axes=HEADS_FIRST,
        ),
        _text(
            "blocks/attention/key/kernel",
            DECODER + "attn/kv_einsum/w",
            axes=HEADS_FIRST,
            part=0,
            parts=2,
        ),
        _text(
            "blocks/attention/value/kernel",
            DECODER + "attn/kv_einsum/w",
            axes=HEADS_FIRST,
            part=1,
            parts=2,
        ),
        _text(
            "blocks/attention/output/kernel", DECODER + "attn/attn_vec_einsum/w"
        ),
        _text(
            "blocks/mlp/gate/kernel",
            DECODER + "mlp/gating_einsum",
            part=0,
            parts=2,
        ),
        _text(
            "blocks/mlp/up/kernel",
            DECODER + "mlp/gating_einsum",
            part=1,
            parts=2,
        ),
        _text("blocks/mlp/down/kernel", DECODER + "mlp/linear"),
    ]
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    if use_post_norms:
        norms += ["post_attention_norm", "post_ffw_norm"]
    for norm in norms:
        table.append(_text(f"blocks/{norm}/scale", f"{DECODER}{norm}/scale"))
    one = ENCODER if scanned else ENCODER.rstrip("/") + "_{layer}/"
    return [
        replace(row, theirs=prefix + row.theirs.replace(ENCODER, one))
        for row in table
    ]


def _pair(ours, theirs):
    return [
        Row(f"vision_encoder/{ours}/{part}", theirs + part)
        for part in ("kernel", "bias")
    ]


def _norm(ours, theirs):
    return [
        Row(f"vision_encoder/{ours}/gamma", theirs + "scale"),
        Row(f"vision_encoder/{ours}/beta", theirs + "bias"),
    ]


def _text(ours, theirs, **how):
    return Row(f"text_decoder/{ours}", theirs, **how)
