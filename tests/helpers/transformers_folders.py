"""Small models of ours as transformers folders."""

import numpy as np

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import without_values
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig

# As in the published files, fields that equal a default are omitted.
SECOND = {
    "model_type": "paligemma",
    "image_token_index": 257152,
    "projection_dim": 2304,
    "text_config": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_image_tokens": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 257216,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "projection_dim": 2304,
        "vision_use_head": False,
    },
}


def random_backbone(seed=7, **changes):
    """Return our backbone with weights that distinguish tokens and pictures."""
    with without_values():
        backbone = PaliGemmaBackbone(
            28,
            {
                "patch_size": 7,
                "num_layers": 2,
                "hidden_dim": 36,
                "num_heads": 4,
                "intermediate_dim": 52,
            },
            {
                "vocabulary_size": 2048,
                "num_layers": 3,
                "hidden_dim": 48,
                "intermediate_dim": 88,
                "num_query_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 10,
                "query_pre_attention_scalar": 8,
            },
            **changes,
        )
    random = np.random.default_rng(seed)
    arrays = {}
    rows = hugging_face.rows(backbone.architecture())
    shapes = engine.shapes(backbone.weights_by_name(), rows)
    for key, shape in shapes.items():
        matrix = len(shape) > 1
        scale = 2.5 * shape[-1] ** -0.5 if matrix else 0.3
        if "embed_tokens" in key:
            # Small enough that the model does not only repeat a token.
            scale = 0.05
        arrays[key] = random.normal(0, scale, shape).astype("float32")
    engine.load(backbone.weights_by_name(), rows, engine.Arrays(arrays))
    return backbone


def export(folder, backbone, tokenizer=None, resize="bicubic", **how):
    """Write a backbone as a transformers folder."""
    config = ModelConfig(
        backbone=backbone.architecture(),
        preprocessor=PreprocessorConfig(resize),
    )
    arrays = engine.write(
        backbone.weights_by_name(),
        hugging_face.rows(config.backbone),
    )
    hugging_face.write(folder, config, arrays, tokenizer, **how)


def load_theirs(folder):
    """Load a folder with transformers; its weights must match exactly."""
    from transformers import PaliGemmaForConditionalGeneration

    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()
