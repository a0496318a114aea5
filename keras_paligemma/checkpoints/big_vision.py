"""Table of names of big_vision, PaliGemma's original code (`.npz` files)."""

import math
import re
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
        scanned: bool, whether the vision blocks are stacked; `False` if each
            has its own keys, "encoderblock_0/…".

    Returns:
        list of `Row`.

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
        *_halves(
            ("attention/key", "attention/value"),
            DECODER + "attn/kv_einsum/w",
            axes=HEADS_FIRST,
        ),
        _text(
            "blocks/attention/output/kernel", DECODER + "attn/attn_vec_einsum/w"
        ),
        *_halves(("mlp/gate", "mlp/up"), DECODER + "mlp/gating_einsum"),
        _text("blocks/mlp/down/kernel", DECODER + "mlp/linear"),
    ]
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    if use_post_norms:
        norms += ["post_attention_norm", "post_ffw_norm"]
    for norm in norms:
        table.append(_text(f"blocks/{norm}/scale", f"{DECODER}{norm}/scale"))
    block = ENCODER if scanned else ENCODER.rstrip("/") + "_{layer}/"
    return [
        replace(row, key=prefix + row.key.replace(ENCODER, block))
        for row in table
    ]


def infer(shapes):
    """Infer a model's sizes from the shapes of its arrays.

    Args:
        shapes: dict of key to shape, as in the file.

    Returns:
        dict of the backbone's fields, without those that shapes do not
        determine, and the list of rows for these keys.

    Raises:
        ValueError: keys or ranks are not those of a PaliGemma.
    """
    prefix = (
        "params/" if any(key.startswith("params/") for key in shapes) else ""
    )
    scanned = not any(f"{ENCODER[:-1]}_0/" in key for key in shapes)
    post_norms = f"{prefix}{DECODER}post_attention_norm/scale" in shapes
    table = {row.name: row for row in rows(post_norms, prefix, scanned)}

    def sizes(name, rank, tower="text_decoder"):
        row = table[f"{tower}/{name}"]
        key = row.keys(1)[0]
        if len(shapes.get(key, ())) != rank:
            raise ValueError(
                "The keys are not those of a PaliGemma of big_vision. "
                f"Expected: {key!r} of rank {rank}, among others. Received: "
                f"{shapes.get(key, 'no such key')}; there are {len(shapes)} "
                f"keys, such as {sorted(shapes)[:3]}."
            )
        return shapes[key]

    patch, _, _, vision_dim = sizes(
        "patch_embedding/kernel", 4, "vision_encoder"
    )
    tokens = sizes("position_embedding", 3, "vision_encoder")[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"Pictures are square here. Received: {tokens} positions."
        )
    query = sizes(
        "blocks/attention/query/kernel", 4 if scanned else 3, "vision_encoder"
    )
    up = sizes("blocks/mlp/up/kernel", 3 if scanned else 2, "vision_encoder")
    vision_layers = query[0]
    if not scanned:
        numbers = re.findall(r"/encoderblock_(\d+)/", "\n".join(shapes))
        vision_layers = len(set(numbers))
    vocabulary_size, hidden_dim = sizes("token_embedding/table", 2)
    layers, heads, _, head_dim = sizes("blocks/attention/query/kernel", 4)
    backbone = {
        "image_size": side * patch,
        "vision_encoder": {
            "patch_size": patch,
            "num_layers": vision_layers,
            "hidden_dim": vision_dim,
            "num_heads": query[-2],
            "intermediate_dim": up[-1],
        },
        "text_decoder": {
            "vocabulary_size": vocabulary_size,
            "num_layers": layers,
            "hidden_dim": hidden_dim,
            "num_query_heads": heads,
            "num_key_value_heads": sizes("blocks/attention/key/kernel", 5)[2],
            "head_dim": head_dim,
            "intermediate_dim": sizes("blocks/mlp/down/kernel", 3)[1],
            "use_post_norms": post_norms,
        },
    }
    return backbone, list(table.values())


def _pair(name, key):
    return [
        Row(f"vision_encoder/{name}/{part}", key + part)
        for part in ("kernel", "bias")
    ]


def _norm(name, key):
    return [
        Row(f"vision_encoder/{name}/gamma", key + "scale"),
        Row(f"vision_encoder/{name}/beta", key + "bias"),
    ]


def _halves(names, key, axes=None):
    """List the rows of two kernels that lie in one array."""
    return [
        _text(f"blocks/{name}/kernel", key, axes=axes, part=part, parts=2)
        for part, name in enumerate(names)
    ]


def _text(name, key, **how):
    return Row(f"text_decoder/{name}", key, **how)
