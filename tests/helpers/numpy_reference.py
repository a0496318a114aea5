"""PaliGemma's forward pass in NumPy, as a reference for the package.

It is written from the description of the architecture and checked against
numbers of the original implementation (`golden/`). It shares no code with the
package and is simple rather than fast: loops over layers, no cache, no options.

Shapes: B batch, F frames, I image tokens of one frame, T text tokens,
L = F·I + T, N query heads, K key/value heads, G = N/K, H head size, D width.
"""

from pathlib import Path

import numpy as np

# Added to forbidden attention logits; far below any soft-capped logit.
MASKED = -1e30


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read an `.npz`, converting bfloat16, which NumPy stores as `|V2`."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file}
    for key, array in arrays.items():
        if array.dtype == np.dtype("V2"):
            # bfloat16 is the upper half of a float32.
            bits = array.view(np.uint16).astype(np.uint32) << 16
            arrays[key] = bits.view(np.float32)
    return arrays


def settings_of(config) -> dict[str, float | None]:
    """Convert a decoder's configuration to the settings of `forward`."""
    return {
        "query_scale": config.query_pre_attention_scalar**-0.5,
        "attention_soft_cap": config.attention_logit_soft_cap,
        "final_soft_cap": config.final_logit_soft_cap,
        "embedding_scale": config.hidden_dim**0.5,
        "rope_base": config.rope_base,
    }


def forward(
    arrays: dict[str, np.ndarray],
    settings: dict[str, float | None],
    images: np.ndarray,
    token_ids: np.ndarray,
    padding_mask: np.ndarray,
    response_mask: np.ndarray,
    dtype: type = np.float64,
) -> dict[str, np.ndarray]:
    """Run the whole model.

    Args:
        arrays: dict, a checkpoint in big_vision's layout with stacked layers.
            The prefix `params/` is optional. Without post norms it is read as
            PaliGemma 1.
        settings: dict of `query_scale`, `attention_soft_cap` (or None),
            `final_soft_cap` (or None), `embedding_scale` and `rope_base`.
        images: array `(B, h, w, 3)` or `(B, F, h, w, 3)`, in [-1, 1].
        token_ids: array `(B, T)`.
        padding_mask: array `(B, T)`, True where a token is not padding.
        response_mask: array `(B, T)`, True on answer tokens, which are causal.
        dtype: dtype of every computation.

    Returns:
        `image_embeddings` `(B, F·I, D)`, `hidden_states` `(B, L, D)` after
        the final norm, `logits` and `capped_logits` `(B, L, V)`, `attention`
        (layers, B, N, L, L). Values at padded positions have no meaning.
    """
    arrays = {
        key.removeprefix("params/"): np.asarray(array, dtype)
        for key, array in arrays.items()
    }
    image_embeddings = encode_images(arrays, np.asarray(images, dtype))
    table = arrays["llm/embedder/input_embedding"]
    text_embeddings = table[token_ids] * dtype(settings["embedding_scale"])
    x = np.concatenate([image_embeddings, text_embeddings], axis=1)

    # Image tokens are always valid and belong to the prefix.
    image_part = ((0, 0), (image_embeddings.shape[1], 0))
    valid = np.pad(padding_mask.astype(bool), image_part, constant_values=True)
    causal = np.pad(response_mask.astype(bool), image_part)
    mask = attention_mask(causal, valid)
    positions = np.cumsum(valid, axis=1) - 1

    attention = []
    for block in layers(arrays, "llm/layers/"):
        y = rms_norm(x, block["pre_attention_norm/scale"])
        attention.append(attention_weights(block, settings, y, positions, mask))
        x = decoder_block(block, settings, x, positions, mask)
    x = rms_norm(x, arrays["llm/final_norm/scale"])
    logits = x @ table.T
    return {
        "image_embeddings": image_embeddings,
        "hidden_states": x,
        "logits": logits,
        "capped_logits": soft_cap(logits, settings["final_soft_cap"]),
        "attention": np.stack(attention),
    }


def layers(
    arrays: dict[str, np.ndarray], prefix: str
) -> list[dict[str, np.ndarray]]:
    """Return a dictionary for each layer; the arrays have layers on axis 0."""
    stacked = {
        key.removeprefix(prefix): array
        for key, array in arrays.items()
        if key.startswith(prefix)
    }
    depth = len(next(iter(stacked.values())))
    return [
        {key: array[i] for key, array in stacked.items()} for i in range(depth)
    ]


# The vision encoder


def encode_images(
    arrays: dict[str, np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Encode images to `(B, F·I, D)`: concatenated frames, no separator."""
    x = embed_patches(arrays, images.reshape(-1, *images.shape[-3:]))
    for block in layers(arrays, "img/Transformer/encoderblock/"):
        x = encoder_block(block, x)
    x = layer_norm(x, arrays, "img/Transformer/encoder_norm")
    x = dense(x, arrays, "img/head")
    return x.reshape(len(images), -1, x.shape[-1])


def embed_patches(
    arrays: dict[str, np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Apply a convolution whose stride is its size, as a matrix product."""
    kernel = arrays["img/embedding/kernel"]
    size = kernel.shape[0]
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    patches = images[:, : rows * size, : columns * size].reshape(
        batch, rows, size, columns, size, channels
    )
    x = np.einsum("brpcqk,pqkd->brcd", patches, kernel)
    x = x + arrays["img/embedding/bias"]
    return x.reshape(batch, rows * columns, -1) + arrays["img/pos_embedding"]


def encoder_block(block: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    attention = "MultiHeadDotProductAttention_0"

    def project(name: str) -> np.ndarray:
        kernel = block[f"{attention}/{name}/kernel"]
        bias = block[f"{attention}/{name}/bias"]
        return np.einsum("bid,dnh->binh", normed, kernel) + bias

    normed = layer_norm(x, block, "LayerNorm_0")
    query, key, value = map(project, ("query", "key", "value"))
    logits = np.einsum("binh,bjnh->bnij", query, key)
    weights = softmax(logits * query.shape[-1] ** -0.5)
    heads = np.einsum("bnij,bjnh->binh", weights, value)
    x = x + np.einsum("binh,nhd->bid", heads, block[f"{attention}/out/kernel"])
    x = x + block[f"{attention}/out/bias"]

    normed = layer_norm(x, block, "LayerNorm_1")
    hidden = gelu(dense(normed, block, "MlpBlock_0/Dense_0"))
    return x + dense(hidden, block, "MlpBlock_0/Dense_1")


# The text decoder


def attention_mask(causal: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Build the mask: True at `[b, i, j]` if token i attends to token j.

    Tokens that are not causal share the count of the causal tokens before them.
    Each one therefore attends to its whole run and to everything earlier.
    """
    count = np.cumsum(causal, axis=1)
    visible = count[:, None, :] <= count[:, :, None]
    return visible & valid[:, None, :] & valid[:, :, None]


def decoder_block(
    block: dict[str, np.ndarray],
    settings: dict[str, float | None],
    x: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, block[f"{name}_norm/scale"])

    def post_norm(x: np.ndarray, name: str) -> np.ndarray:
        # PaliGemma 1 has no post norms.
        return norm(x, name) if f"{name}_norm/scale" in block else x

    y = attend(block, settings, norm(x, "pre_attention"), positions, mask)
    x = x + post_norm(y, "post_attention")
    gate, up = block["mlp/gating_einsum"]
    y = norm(x, "pre_ffw")
    y = (gelu(y @ gate) * (y @ up)) @ block["mlp/linear"]
    return x + post_norm(y, "post_ffw")


def attend(
    block: dict[str, np.ndarray],
    settings: dict[str, float | None],
    x: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    weights = attention_weights(block, settings, x, positions, mask)
    value = np.einsum("bld,kdh->blkh", x, block["attn/kv_einsum/w"][1])
    value = value.repeat(weights.shape[1] // value.shape[2], axis=2)
    heads = np.einsum("bnij,bjnh->binh", weights, value)
    return np.einsum("binh,nhd->bid", heads, block["attn/attn_vec_einsum/w"])


def attention_weights(
    block: dict[str, np.ndarray],
    settings: dict[str, float | None],
    x: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    query = np.einsum("bld,ndh->blnh", x, block["attn/q_einsum/w"])
    key = np.einsum("bld,kdh->blkh", x, block["attn/kv_einsum/w"][0])
    query = rotate(query, positions, settings["rope_base"])
    key = rotate(key, positions, settings["rope_base"])
    query = query * x.dtype.type(settings["query_scale"])

    # Query head n reads key/value head n // G.
    key = key.repeat(query.shape[2] // key.shape[2], axis=2)
    logits = np.einsum("binh,bjnh->bnij", query, key)
    logits = soft_cap(logits, settings["attention_soft_cap"])
    return softmax(np.where(mask[:, None], logits, x.dtype.type(MASKED)))


def rotate(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """Apply the rotary embedding: channel c is paired with channel c + H/2."""
    half = x.shape[-1] // 2
    frequencies = base ** -(np.arange(half) / half)
    angles = positions[:, :, None, None] * frequencies
    cosine, sine = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return np.concatenate(rotated, axis=-1).astype(x.dtype)


# Shared by both towers


def dense(
    x: np.ndarray, arrays: dict[str, np.ndarray], name: str
) -> np.ndarray:
    return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]


def layer_norm(
    x: np.ndarray, arrays: dict[str, np.ndarray], name: str
) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(variance + 1e-6)
    return normed * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def rms_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + 1e-6) * (1 + scale)


def gelu(x: np.ndarray) -> np.ndarray:
    """Compute the tanh approximation; the exact form gives other logits."""
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def soft_cap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
