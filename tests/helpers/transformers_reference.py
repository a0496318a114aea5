"""A tiny random PaliGemma of `transformers`, and its converted weights.

This is the second independent implementation to compare with. `run` returns its
logits. `transformers_to_big_vision` returns its weights in the layout that the
NumPy reference and the package's checkpoint reader use.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VISION = {
    "model_type": "siglip_vision_model",
    "image_size": 21,
    "patch_size": 7,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vision_use_head": False,
}
# All sizes differ, heads times head size is not the width, and the query scale
# does not follow from the head size, as in the 28b model.
TEXT = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "head_dim": 10,
}
PALIGEMMA_1 = TEXT | {
    "model_type": "gemma",
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}
PALIGEMMA_2 = TEXT | {
    "model_type": "gemma2",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


def tiny_transformers_model(
    seed: int, version: int = 2
) -> transformers.PaliGemmaForConditionalGeneration:
    """Build a random float32 model in evaluation mode with eager attention."""
    config = transformers.PaliGemmaConfig(
        vision_config=VISION,
        text_config=PALIGEMMA_2 if version == 2 else PALIGEMMA_1,
        # As in published models, the image's id follows the vocabulary.
        image_token_index=TEXT["vocab_size"],
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
        projection_dim=TEXT["hidden_size"],
    )
    model = transformers.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Norms and biases are drawn too; they would be ones and zeros
        # otherwise. The scale is large enough for logits to reach both soft
        # caps.
        kernel_scale = 2.5 * parameter.shape[-1] ** -0.5
        scale = kernel_scale if parameter.ndim > 1 else 0.3
        parameter.data.normal_(0, scale, generator=generator)
    return model.eval()


def run(model, *arrays, **inputs) -> np.ndarray:
    """Return the logits of `forward` as an array."""
    with torch.no_grad():
        return forward(model, *arrays, **inputs).numpy()


def forward(
    model: transformers.PaliGemmaForConditionalGeneration,
    images: np.ndarray,
    token_ids: np.ndarray,
    padding_mask: np.ndarray,
    response_mask: np.ndarray,
) -> torch.Tensor:
    """Compute logits `(B, L, V)` of images or of frames.

    Images are `(B, h, w, 3)` or `(B, F, h, w, 3)`. The masks are those of the
    NumPy reference. Position ids are given, since `transformers` counts padding
    by default. They start at 1, as in `transformers`; rotary embeddings depend
    only on differences, so 0 would give the same result.
    """
    vision = model.config.vision_config
    frames = images.shape[1] if images.ndim == 5 else 1
    length = frames * (vision.image_size // vision.patch_size) ** 2
    image_part = ((0, 0), (length, 0))
    image_id = model.config.image_token_id
    token_ids = np.pad(token_ids, image_part, constant_values=image_id)
    valid = np.pad(padding_mask > 0, image_part, constant_values=True)
    causal = np.pad(response_mask > 0, image_part)
    pixels = images.reshape(-1, *images.shape[-3:]).transpose(0, 3, 1, 2)
    return model(
        input_ids=torch.tensor(token_ids),
        pixel_values=torch.tensor(pixels, dtype=torch.float32),
        attention_mask=torch.tensor(valid.astype(np.int64)),
        position_ids=torch.tensor(valid.cumsum(axis=1)),
        # Without these ids, the prompt silently becomes causal.
        token_type_ids=torch.tensor(causal.astype(np.int64)),
    ).logits


def numpy_settings(
    config: transformers.PaliGemmaConfig,
) -> dict[str, float | None]:
    """Return the NumPy reference's settings for a model."""
    text = config.text_config
    scalar = getattr(text, "query_pre_attn_scalar", text.head_dim)
    return {
        "query_scale": scalar**-0.5,
        "attention_soft_cap": getattr(text, "attn_logit_softcapping", None),
        "final_soft_cap": getattr(text, "final_logit_softcapping", None),
        "embedding_scale": text.hidden_size**0.5,
        "rope_base": text.rope_parameters["rope_theta"],
    }


def transformers_to_big_vision(
    state_dict: dict[str, torch.Tensor],
    config: transformers.PaliGemmaConfig,
) -> dict[str, np.ndarray]:
    """Convert weights to big_vision's layout: stacked, kernels transposed."""
    state = {key: value.numpy() for key, value in state_dict.items()}
    vision = _vision_arrays(state, config.vision_config)
    text = _text_arrays(state, config.text_config)
    return {f"params/{key}": value for key, value in (vision | text).items()}


def _vision_arrays(state: dict[str, np.ndarray], config) -> dict:
    tower = "model.vision_tower"
    block = "img/Transformer/encoderblock"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    heads = (config.num_attention_heads, -1)

    def stack(name: str) -> np.ndarray:
        return _stack(state, f"{tower}.encoder.layers", name)

    arrays = {}
    for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
        kernel = stack(f"self_attn.{theirs}_proj.weight").mT
        bias = stack(f"self_attn.{theirs}_proj.bias")
        arrays[f"{attention}/{ours}/kernel"] = _split(kernel, 2, heads)
        arrays[f"{attention}/{ours}/bias"] = _split(bias, 1, heads)
    kernel = stack("self_attn.out_proj.weight").mT
    arrays[f"{attention}/out/kernel"] = _split(kernel, 1, heads)
    arrays[f"{attention}/out/bias"] = stack("self_attn.out_proj.bias")
    for i in range(2):
        norm, dense = f"LayerNorm_{i}", f"MlpBlock_0/Dense_{i}"
        arrays[f"{block}/{norm}/scale"] = stack(f"layer_norm{i + 1}.weight")
        arrays[f"{block}/{norm}/bias"] = stack(f"layer_norm{i + 1}.bias")
        arrays[f"{block}/{dense}/kernel"] = stack(f"mlp.fc{i + 1}.weight").mT
        arrays[f"{block}/{dense}/bias"] = stack(f"mlp.fc{i + 1}.bias")

    embedding = f"{tower}.embeddings"
    kernel = state[f"{embedding}.patch_embedding.weight"]
    position = state[f"{embedding}.position_embedding.weight"]
    projector = "model.multi_modal_projector.linear"
    return arrays | {
        "img/embedding/kernel": kernel.transpose(2, 3, 1, 0),
        "img/embedding/bias": state[f"{embedding}.patch_embedding.bias"],
        "img/pos_embedding": position[None],
        "img/Transformer/encoder_norm/scale": state[
            f"{tower}.post_layernorm.weight"
        ],
        "img/Transformer/encoder_norm/bias": state[
            f"{tower}.post_layernorm.bias"
        ],
        "img/head/kernel": state[f"{projector}.weight"].T,
        "img/head/bias": state[f"{projector}.bias"],
    }


def _text_arrays(state: dict[str, np.ndarray], config) -> dict:
    prefix = "model.language_model"
    norms = {
        "pre_attention": "input",
        "post_attention": "post_attention",
        "pre_ffw": "pre_feedforward",
        "post_ffw": "post_feedforward",
    }
    if config.model_type == "gemma":
        # There, `post_attention` is the norm between attention and MLP.
        norms = {"pre_attention": "input", "pre_ffw": "post_attention"}

    def stack(name: str) -> np.ndarray:
        return _stack(state, f"{prefix}.layers", name)

    def heads(name: str, number: int) -> np.ndarray:
        """Convert `(layers, N·H, D)` to `(layers, N, D, H)`."""
        kernel = stack(f"self_attn.{name}_proj.weight")
        return _split(kernel, 1, (number, -1)).mT

    query_heads = config.num_attention_heads
    key_value = [heads(name, config.num_key_value_heads) for name in "kv"]
    gate_up = [stack(f"mlp.{name}_proj.weight").mT for name in ("gate", "up")]
    output = stack("self_attn.o_proj.weight").mT
    arrays = {
        "attn/q_einsum/w": heads("q", query_heads),
        "attn/kv_einsum/w": np.stack(key_value, axis=1),
        "attn/attn_vec_einsum/w": _split(output, 1, (query_heads, -1)),
        "mlp/gating_einsum": np.stack(gate_up, axis=1),
        "mlp/linear": stack("mlp.down_proj.weight").mT,
    }
    for ours, theirs in norms.items():
        arrays[f"{ours}_norm/scale"] = stack(f"{theirs}_layernorm.weight")
    return {f"llm/layers/{key}": value for key, value in arrays.items()} | {
        "llm/embedder/input_embedding": state[f"{prefix}.embed_tokens.weight"],
        "llm/final_norm/scale": state[f"{prefix}.norm.weight"],
    }


def _stack(state: dict[str, np.ndarray], layers: str, name: str) -> np.ndarray:
    depth = sum(
        key.startswith(f"{layers}.") and key.endswith(f".{name}")
        for key in state
    )
    return np.stack([state[f"{layers}.{i}.{name}"] for i in range(depth)])


def _split(array: np.ndarray, axis: int, sizes: tuple[int, int]) -> np.ndarray:
    """Split one axis into two."""
    shape = array.shape
    return array.reshape(*shape[:axis], *sizes, *shape[axis + 1 :])
