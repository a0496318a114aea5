"""What transformers writes beside the weights, to our config and back."""

import ml_dtypes
import numpy as np

# Defaults of transformers, for saved files omit what equals them.
GEMMA = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
GEMMA_2 = GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
IMAGE_TOKEN = 256_000

TEXT_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_epsilon": "rms_norm_eps",
}
VISION_FIELDS = {
    "patch_size": "patch_size",
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "intermediate_dim": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}
# What the model does not vary: what a file may say of it.
TEXT_FIXED = {
    # Gemma's first files said "gelu" and meant its approximation.
    "hidden_act": ("gelu_pytorch_tanh", "gelu", None),
    "hidden_activation": ("gelu_pytorch_tanh", "gelu", None),
    "attention_bias": (False,),
    "rope_scaling": (None,),
}
VISION_FIXED = {"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)}
PROCESSOR_FIXED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "image_mean": ([0.5] * 3,),
    "image_std": ([0.5] * 3,),
    "rescale_factor": (1 / 255,),
}
# Pillow's numbers. Its bilinear filter is that of the original, but rounds
# where the original truncates: a pixel may differ by one of 255 steps.
RESAMPLE = {"bicubic": 3, "bilinear_antialias": 2}
DTYPES = {
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def from_transformers(config, processor, source):
    """Turn the configs of transformers into ours.

    The published text configs have a sliding window of 4096, Gemma 2's; the
    original attends without one, so it is read as none.

    Args:
        config: dict, of `config.json`.
        processor: dict, of `preprocessor_config.json`, or `None`.
        source: path, for messages.

    Returns:
        Dict of `backbone` and `preprocessor`; see `hugging_face.read_config`.

    Raises:
        ValueError: listing all that cannot be expressed.
    """
    if config.get("model_type") != "paligemma":
        raise ValueError(
            f"{source} holds another model. Expected: model_type 'paligemma'. "
            f"Received: {config.get('model_type')!r}."
        )
    text = _section(config, "text_config", source)
    kind = text.get("model_type", "gemma")
    defaults = {"gemma": GEMMA, "gemma2": GEMMA_2}.get(kind)
    if defaults is None:
        raise ValueError(
            f"{source} has a text model that no PaliGemma has. Expected: "
            f"'gemma' or 'gemma2'. Received: {kind!r}."
        )
    text = defaults | text
    vision = SIGLIP | _section(config, "vision_config", source)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    problems = [
        *_numbers("text_config", text, defaults),
        *_numbers("vision_config", vision, SIGLIP),
        *_fixed("text_config", text, TEXT_FIXED),
        *_fixed("vision_config", vision, VISION_FIXED),
        *_fixed("", {"dtype": dtype}, {"dtype": tuple(DTYPES)}),
    ]
    rope = {"rope_theta": text.get("rope_theta", 10_000.0)}
    if text.get("rope_parameters") is not None:
        rope |= _section(text, "rope_parameters", source)
    problems += [
        *_numbers("rope_parameters", rope, {"rope_theta": 10_000.0}),
        *_fixed("rope_parameters", rope, {"rope_type": ("default",)}),
    ]
    resize = None
    if not problems:
        problems += _window(text)
        if processor is not None:
            resize = _resize(processor, vision["image_size"], problems)
    if problems:
        raise ValueError(
            f"{source} holds a model that cannot be expressed here: "
            f"{'; '.join(problems)}."
        )
    gemma_2 = kind == "gemma2"
    backbone = {
        "image_size": vision["image_size"],
        "dtype": dtype,
        "vision_encoder": {
            ours: vision[theirs] for ours, theirs in VISION_FIELDS.items()
        },
        "text_decoder": {
            "vocabulary_size": _vocabulary_size(config, text),
            **{ours: text[theirs] for ours, theirs in TEXT_FIELDS.items()},
            "query_pre_attention_scalar": text[
                "query_pre_attn_scalar" if gemma_2 else "head_dim"
            ],
            "attention_logit_soft_cap": text.get("attn_logit_softcapping"),
            "final_logit_soft_cap": text.get("final_logit_softcapping"),
            "use_post_norms": gemma_2,
            "sliding_window_size": None,
            "rope_base": rope["rope_theta"],
        },
    }
    preprocessor = None if resize is None else {"resize": resize}
    return {"backbone": backbone, "preprocessor": preprocessor}


def _section(fields, name, source):
    section = fields.get(name)
    if not isinstance(section, dict):
        raise ValueError(
            f"{source} has no {name}. Expected: a JSON object. Received: "
            f"{section!r}."
        )
    return section


def _vocabulary_size(config, text):
    """Count the tokens without the rows from `<image>` on, at most 64."""
    size = text["vocab_size"]
    image = config.get("image_token_index", config.get("image_token_id"))
    image = IMAGE_TOKEN if image is None else image
    return image if size - 64 <= image < size else size


def _numbers(section, fields, defaults):
    """List what is not a positive number where the defaults have one."""
    problems = []
    for name, default in defaults.items():
        value = fields[name]
        optional = "softcapping" in name or name == "sliding_window"
        if value is None and optional:
            continue
        kinds = (int,) if isinstance(default, int) else (int, float)
        if name == "query_pre_attn_scalar":
            kinds = (int, float)
        if type(value) not in kinds or value <= 0:
            problems.append(
                f"{section}.{name} must be a positive {kinds[-1].__name__}, "
                f"received {value!r}"
            )
    return problems


def _fixed(section, fields, allowed):
    prefix = f"{section}." if section else ""
    return [
        f"{prefix}{name} must be {' or '.join(map(repr, values))}, received "
        f"{fields[name]!r}"
        for name, values in allowed.items()
        if fields.get(name, values[0]) not in values
    ]


def _window(text):
    window = text.get("sliding_window")
    if window in (None, 4096) or window >= text["max_position_embeddings"]:
        return []
    # There the prompt sees all of itself in spite of a window; here the
    # window holds for all tokens.
    return [
        "text_config.sliding_window must be null, 4096 or the whole context, "
        f"received {window}"
    ]


def _resize(processor, image_size, problems):
    problems += _fixed("image processor", processor, PROCESSOR_FIXED)
    size = processor.get("size", {"height": 224, "width": 224})
    if size != {"height": image_size, "width": image_size}:
        problems.append(
            f"image processor.size must be that of the model, {image_size}, "
            f"received {size!r}"
        )
    resample = processor.get("resample", 3)
    rules = {number: name for name, number in RESAMPLE.items()}
    if resample not in rules:
        problems.append(
            f"image processor.resample must be one of {sorted(rules)}, "
            f"received {resample!r}"
        )
    return rules.get(resample)


def weight_dtype(backbone):
    """Give the NumPy dtype of the weights under a backbone's dtype policy."""
    name = backbone.get("dtype") or "float32"
    return DTYPES.get("float32" if name.startswith("mixed_") else name)


def to_transformers(config, num_rows):
    """Turn our config into the files of transformers.

    Args:
        config: dict of `backbone` and `preprocessor`; see
            `hugging_face.write`.
        num_rows: int, rows of the embedding in the file.

    Returns:
        Dict of file name to content, a dict.

    Raises:
        ValueError: listing all that transformers cannot express.
    """
    backbone = config["backbone"]
    text, vision = backbone["text_decoder"], backbone["vision_encoder"]
    _check(backbone)
    image_size, width = backbone["image_size"], text["hidden_dim"]
    num_image_tokens = (image_size // vision["patch_size"]) ** 2
    dtype = weight_dtype(backbone).name
    special_ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text_config = {
        "model_type": "gemma2" if text["use_post_norms"] else "gemma",
        "vocab_size": num_rows,
        **{theirs: text[ours] for ours, theirs in TEXT_FIELDS.items()},
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": GEMMA["max_position_embeddings"],
        "num_image_tokens": num_image_tokens,
        "rope_theta": text["rope_base"],
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if text["use_post_norms"]:
        text_config |= {
            # Versions since 5 take whole numbers only.
            "query_pre_attn_scalar": int(text["query_pre_attention_scalar"]),
            "attn_logit_softcapping": text["attention_logit_soft_cap"],
            "final_logit_softcapping": text["final_logit_soft_cap"],
            # There must be a window; this one holds the whole context.
            "sliding_window": GEMMA["max_position_embeddings"],
        }
    files = {
        "config.json": {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            **special_ids,
            # Early versions scale image tokens by this one.
            "hidden_size": width,
            "ignore_index": -100,
            "image_token_index": text["vocabulary_size"],
            "projection_dim": width,
            "text_config": text_config,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
            "vision_config": {
                "model_type": "siglip_vision_model",
                **{
                    theirs: vision[ours]
                    for ours, theirs in VISION_FIELDS.items()
                },
                "hidden_act": "gelu_pytorch_tanh",
                "image_size": image_size,
                "num_channels": 3,
                "num_image_tokens": num_image_tokens,
                "projection_dim": width,
                "vision_use_head": False,
            },
            "vocab_size": num_rows,
        },
        "generation_config.json": special_ids,
    }
    preprocessor = config.get("preprocessor")
    if preprocessor is not None:
        files["preprocessor_config.json"] = {
            "do_convert_rgb": True,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": num_image_tokens,
            "processor_class": "PaliGemmaProcessor",
            **{name: values[0] for name, values in PROCESSOR_FIXED.items()},
            "resample": _resample(preprocessor["resize"]),
            "size": {"height": image_size, "width": image_size},
        }
    return files


def _resample(resize):
    if resize not in RESAMPLE:
        raise ValueError(
            f"transformers has no way to resize by {resize!r}: its filters "
            f"have antialias. Expected: one of {sorted(RESAMPLE)}. Export "
            "with the one that is nearest to the training."
        )
    return RESAMPLE[resize]


def _check(backbone):
    """Refuse a model that transformers has no config for."""
    text = backbone["text_decoder"]
    scalar = text["query_pre_attention_scalar"]
    wanted = {
        "dtype of float32, float16, bfloat16 or mixed": (
            weight_dtype(backbone) is not None
        ),
        "no adapters: merge them first": backbone.get("lora") is None,
        # There the prompt sees all of itself in spite of a window.
        "sliding_window_size=None": text["sliding_window_size"] is None,
    }
    if text["use_post_norms"]:
        wanted |= {
            "a whole query_pre_attention_scalar": scalar == int(scalar),
            "hidden_dim that num_query_heads divides": (
                text["hidden_dim"] % text["num_query_heads"] == 0
            ),
        }
    else:
        wanted |= {
            "without post norms, query_pre_attention_scalar=head_dim": (
                scalar == text["head_dim"]
            ),
            "without post norms, no soft cap": (
                text["attention_logit_soft_cap"] is None
                and text["final_logit_soft_cap"] is None
            ),
        }
    lacking = [name for name, holds in wanted.items() if not holds]
    if lacking:
        raise ValueError(
            "transformers cannot express this model. Expected: "
            f"{'; '.join(lacking)}. Received: {backbone}."
        )
