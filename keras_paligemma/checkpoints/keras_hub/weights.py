"""Table of names and folders of KerasHub's presets of PaliGemma 1 and 2."""

import importlib.metadata
from datetime import datetime

from keras_paligemma import atomic
from keras_paligemma.checkpoints.engine import LAYER
from keras_paligemma.checkpoints.engine import Row
from keras_paligemma.checkpoints.keras_hub import config as keras_hub_config
from keras_paligemma.checkpoints.storage import h5

METADATA = "metadata.json"

VIT = "layers/pali_gemma_vit/layers/"
ENCODER = VIT + "pali_gemma_vit_encoder/"
ENCODER_BLOCK = ENCODER + "resblocks/pali_gemma_vit_encoder_block_{layer}/"
DECODER_BLOCK = "layers/pali_gemma_decoder_block_{layer}/"
NORM = ("gamma", "beta")


def rows(config):
    """List the rows of the format.

    Keras makes the keys from attributes and lists of layers, and from the index
    of a variable in its layer: a kernel is 0, its bias 1.

    Args:
        config: `BackboneConfig`; only `use_post_norms` matters.

    Returns:
        list of `Row`.

    Source: KerasHub 0.32, `models/pali_gemma`; Keras 3.15,
        `saving/saving_lib.py`.
    """
    embeddings = ENCODER + "vision_embeddings/"
    attention = ENCODER_BLOCK + "attn/"
    heads = ("d (n h) -> d n h", "(n h) -> n h")
    table = [
        _row(
            "vision_encoder/position_embedding",
            embeddings + "position_embedding",
        ),
        *_pair("patch_embedding", embeddings + "patch_embedding"),
        *_pair("projector", VIT + "dense"),
        *_pair("final_norm", ENCODER + "encoder_layer_norm", NORM),
        *_pair("blocks/attention_norm", ENCODER_BLOCK + "layer_norm_1", NORM),
        *_pair("blocks/mlp_norm", ENCODER_BLOCK + "layer_norm_2", NORM),
        *_pair("blocks/attention/query", attention + "query_proj", axes=heads),
        *_pair("blocks/attention/key", attention + "key_proj", axes=heads),
        *_pair("blocks/attention/value", attention + "value_proj", axes=heads),
        *_pair(
            "blocks/attention/output",
            attention + "out_proj",
            axes=("(n h) d -> n h d", None),
        ),
        *_pair("blocks/mlp/up", ENCODER_BLOCK + "mlp_dense_1"),
        *_pair("blocks/mlp/down", ENCODER_BLOCK + "mlp_dense_2"),
        _row(
            "text_decoder/token_embedding/table", "layers/reversible_embedding"
        ),
        _row("text_decoder/final_norm/scale", "layers/rms_normalization"),
    ]
    blocks = "text_decoder/blocks/"
    for name in ("query", "key", "value"):
        key = f"{DECODER_BLOCK}attention/{name}_dense"
        axes = "n d h -> d n h"
        table.append(_row(f"{blocks}attention/{name}/kernel", key, axes))
    key = DECODER_BLOCK + "attention/output_dense"
    table.append(_row(f"{blocks}attention/output/kernel", key))
    for name, key in (
        ("gate", "gating_ffw"),
        ("up", "gating_ffw_2"),
        ("down", "ffw_linear"),
    ):
        table.append(_row(f"{blocks}mlp/{name}/kernel", DECODER_BLOCK + key))
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    if config.text_decoder.use_post_norms:
        norms += ["post_attention_norm", "post_ffw_norm"]
    for norm in norms:
        table.append(_row(f"{blocks}{norm}/scale", DECODER_BLOCK + norm))
    return table


def _pair(layer, key, names=("kernel", "bias"), axes=(None, None)):
    return [
        _row(f"vision_encoder/{layer}/{name}", key, axes[number], number)
        for number, name in enumerate(names)
    ]


def _row(name, key, axes=None, number=0):
    key = f"{key}/vars/{number}"
    return Row(name, key, axes, bare_first=LAYER in key)


def write(folder, config, arrays, tokenizer=None, shard_size=h5.SHARD_SIZE):
    """Write a preset folder of KerasHub, atomically.

    Its files appear together; see `atomic.whole_folder`.

    `keras_hub.models.PaliGemmaBackbone.from_preset` reads it and, if there is
    a tokenizer, so does `PaliGemmaCausalLM.from_preset`. KerasHub 0.32 scales
    queries by head_dim whatever the config says, so it runs a 28b model with
    128 instead of the 144 that is written.

    Args:
        folder: path that does not exist, or of an empty folder.
        config: `ModelConfig`; the resize rule and the sum of the lengths of its
            preprocessor are written, with cropping turned off.
        arrays: iterable of pairs of key and array, from `engine.write`.
        tokenizer: bytes of the SentencePiece model; `None` without a
            preprocessor. KerasHub finds "<pad>", "<bos>" and "<eos>" by name.
        shard_size: int, maximum bytes of a weight file.

    Raises:
        ValueError: the folder is not empty, or KerasHub does not support the
            config; nothing is written.
    """
    files = keras_hub_config.files(config, tokenizer)
    atomic.refuse_in_use(folder)
    with atomic.whole_folder(folder, keras_hub_config.CONFIG) as draft:
        for name, content in files.items():
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_bytes(content)
        count = h5.write_h5(draft, arrays, shard_size)
        metadata = keras_hub_config.to_json(_metadata(count))
        (draft / METADATA).write_bytes(metadata)


def _metadata(parameter_count):
    return {
        "keras_version": importlib.metadata.version("keras"),
        "keras_hub_version": importlib.metadata.version("keras-hub"),
        "parameter_count": parameter_count,
        "date_saved": datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
    }
