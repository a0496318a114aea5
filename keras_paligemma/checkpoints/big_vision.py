"""The names of big_vision, where PaliGemma comes from (`.npz` files)."""

from keras_paligemma.checkpoints.engine import Row

ENCODER = "img/Transformer/encoderblock/"
ATTENTION = ENCODER + "MultiHeadDotProductAttention_0/"
DECODER = "llm/layers/"
HEADS_LAST = (0, 2, 1, 3)  # (L, N, D, H) there, (L, D, N, H) here


def rows(use_post_norms=True, prefix="params/"):
    """List the rows of the format.

    Args:
        use_post_norms: bool, `False` for PaliGemma 1.
        prefix: str before each key, "params/" or "".

    Returns:
        List of `Row`.

    Source: big_vision, `models/proj/paligemma/paligemma.py`,
        `models/vit.py` and `models/ppp/gemma.py`.
    """
    table = [
        Row(
            "vision_encoder/position_embedding",
            "img/pos_embedding",
            squeeze=True,
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
            axes=HEADS_LAST,
        ),
        _text(
            "blocks/attention/key/kernel",
            DECODER + "attn/kv_einsum/w",
            axes=HEADS_LAST,
            part=0,
            parts=2,
        ),
        _text(
            "blocks/attention/value/kernel",
            DECODER + "attn/kv_einsum/w",
            axes=HEADS_LAST,
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
    return [
        Row(**(vars(row) | {"theirs": prefix + row.theirs})) for row in table
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
