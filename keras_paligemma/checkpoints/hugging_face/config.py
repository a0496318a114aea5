"""Conversion between transformers' configuration files and our config."""

import json

from keras_paligemma.checked import shown
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig

# Defaults of transformers: saved files omit fields that equal them.
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
IMAGE, IMAGE_TOKEN = "<image>", 256_000
# Published files have 64 rows more than the tokenizer has pieces; the first
# of them is `<image>`.
EXTRA_ROWS = 64

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
# Fields that are constant in the model, and the values that a file may have.
TEXT_FIXED = {
    # Gemma's first files have "gelu" but mean its tanh approximation.
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
# Pillow's numbers. Its bilinear filter is that of the original, except that it
# rounds where the original truncates: a pixel may differ by 1 of 255.
RESAMPLE = {"bicubic": 3, "bilinear_antialias": 2}
DTYPES = ("float32", "float16", "bfloat16")


def from_transformers(config, processor, source, added_tokens=None):
    """Convert the configs of transformers to ours.

    The published text configs have Gemma 2's sliding window of 4096. It is
    ignored, since the original attends without a window.

    Args:
        config: dict, content of `config.json`.
        processor: dict, content of `preprocessor_config.json`, or `None`.
        source: path, named in errors.
        added_tokens: dict of id to token, from the tokenizer's files; `None`
            if there are none.

    Returns:
        `ModelConfig`; its preprocessor is `None` if `processor` is.

    Raises:
        ValueError: listing all fields that cannot be expressed.
    """
    if config.get("model_type") != "paligemma":
        raise ValueError(
            f"{source} holds another model. Expected: model_type 'paligemma'. "
            f"Received: {shown(config.get('model_type'))}."
        )
    _refuse_quantized(config, source)
    text = _section(config, "text_config", source)
    kind = text.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise ValueError(
            f"{source} has a text model that no PaliGemma has. Expected: "
            f"'gemma' or 'gemma2'. Received: {shown(kind)}."
        )
    gemma_2 = kind == "gemma2"
    text = (GEMMA_2 if gemma_2 else GEMMA) | text
    vision = SIGLIP | _section(config, "vision_config", source)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    rope = {"rope_theta": text.get("rope_theta", 10_000.0)}
    if text.get("rope_parameters") is not None:
        rope |= _section(text, "rope_parameters", source)
    scalar = "query_pre_attn_scalar" if gemma_2 else "head_dim"
    # Our fields, and their names in transformers.
    text_names = TEXT_FIELDS | {
        "vocabulary_size": "vocab_size",
        "query_pre_attention_scalar": scalar,
        "attention_logit_soft_cap": "attn_logit_softcapping",
        "final_logit_soft_cap": "final_logit_softcapping",
    }
    text_fields = {name: text.get(key) for name, key in text_names.items()} | {
        "use_post_norms": gemma_2,
        "rope_base": rope["rope_theta"],
    }
    vision_fields = {name: vision[key] for name, key in VISION_FIELDS.items()}
    image_size = {"image_size": vision["image_size"]}
    problems = [
        *TextDecoderConfig.problems(
            text_fields,
            _within("text_config", text_names | {"rope_base": "rope_theta"}),
        ),
        *VisionEncoderConfig.problems(
            vision_fields, _within("vision_config", VISION_FIELDS)
        ),
        *BackboneConfig.problems(image_size, prefix="vision_config."),
        *_fixed("text_config", text, TEXT_FIXED),
        *_fixed("vision_config", vision, VISION_FIXED),
        *_fixed("", {"dtype": dtype}, {"dtype": DTYPES}),
        *_fixed("rope_parameters", rope, {"rope_type": ("default",)}),
        *_window(text),
    ]
    resize = None
    if processor is not None:
        resize = _resize(processor, vision["image_size"], problems)
    if problems:
        raise ValueError(
            f"{source} holds a model that cannot be expressed here: "
            f"{'; '.join(problems)}."
        )
    text_fields["vocabulary_size"] = _vocabulary_size(
        text["vocab_size"],
        _image_token(config, added_tokens or {}, source),
        added_tokens,
        source,
    )
    return ModelConfig.from_dict(
        {
            "backbone": {
                "image_size": vision["image_size"],
                "dtype": dtype,
                "vision_encoder": vision_fields,
                "text_decoder": text_fields,
            },
            "preprocessor": resize and {"resize": resize},
        },
        source,
    )


def _within(section, names):
    return {name: f"{section}.{key}" for name, key in names.items()}


def _refuse_quantized(config, source):
    found = config.get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found
    raise ValueError(
        f"{source} holds weights that were quantised by {shown(method)}, which "
        "is not read. Expected: float32, bfloat16 or float16. Load the model "
        "that it was made from, with `quantize='int4'` or 'int8'; or in "
        "transformers call `model.dequantize()` and `save_pretrained`."
    )


def _section(fields, name, source):
    section = fields.get(name)
    if not isinstance(section, dict):
        raise ValueError(
            f"{source} has no {name}. Expected: a JSON object. Received: "
            f"{shown(section)}."
        )
    return section


def _image_token(config, added_tokens, source):
    """Find the id of `<image>`, which follows the pieces of a tokenizer."""
    said = config.get("image_token_index", config.get("image_token_id"))
    named = [id for id, token in added_tokens.items() if token == IMAGE]
    ids = [*named, *([] if said is None else [said])]
    if len(set(map(repr, ids))) > 1 or not all(type(id) is int for id in ids):
        raise ValueError(
            f"{source} has {shown(said)} as image_token_index, and its "
            f"tokenizer {shown(named)} as `<image>`. Expected: one whole "
            "number. Save the processor beside the model again."
        )
    return ids[0] if ids else IMAGE_TOKEN


def _vocabulary_size(num_rows, image_token, added_tokens, source):
    """Count the tokens: pieces, and those that the tokenizer adds.

    `<image>` follows the pieces. Rows after the pieces count up to the last row
    that the tokenizer has a name for; the others are unused (64 in published
    files).
    """
    extra = num_rows - image_token
    # In random models of tests, `<image>` may be one of the pieces.
    if extra <= 0 or extra > max(EXTRA_ROWS, image_token):
        return num_rows
    if added_tokens is None and extra > EXTRA_ROWS:
        raise ValueError(
            f"{source} has an embedding of {num_rows} rows, {extra} more than "
            "there are pieces in front of `<image>`. Expected: at most "
            f"{EXTRA_ROWS}, or the tokenizer's files beside the model, which "
            "name the tokens that were added. Write them there with "
            "`processor.save_pretrained(folder)`."
        )
    named = [token for token in added_tokens or () if token > image_token]
    size = max(named, default=image_token - 1) + 1
    if size > num_rows:
        raise ValueError(
            f"{source} has a tokenizer of {size} tokens, of which "
            f"{len(named)} were added, and an embedding of {num_rows} rows. "
            "Expected: a row for each token. Call `model."
            "resize_token_embeddings(len(tokenizer))` and save both again."
        )
    return size


def _fixed(section, fields, allowed):
    prefix = f"{section}." if section else ""
    return [
        f"{prefix}{name} must be {' or '.join(map(repr, values))}, received "
        f"{shown(fields[name])}"
        for name, values in allowed.items()
        if fields.get(name, values[0]) not in values
    ]


def _window(text):
    window, context = (
        text.get("sliding_window"),
        text["max_position_embeddings"],
    )
    if window in (None, 4096):
        return []
    if type(window) is type(context) is int and window >= context:
        return []
    # In transformers, a prompt attends to all of itself despite a window;
    # here the window applies to all tokens.
    return [
        "text_config.sliding_window must be null, 4096 or the whole context, "
        f"received {shown(window)}"
    ]


def _resize(processor, image_size, problems):
    problems += _fixed("image processor", processor, PROCESSOR_FIXED)
    size = processor.get("size", {"height": 224, "width": 224})
    if size != {"height": image_size, "width": image_size}:
        problems.append(
            f"image processor.size must be that of the model, {image_size}, "
            f"received {shown(size)}"
        )
    resample = processor.get("resample", 3)
    rules = {number: name for name, number in RESAMPLE.items()}
    if type(resample) is not int or resample not in rules:
        problems.append(
            f"image processor.resample must be one of {sorted(rules)}, "
            f"received {shown(resample)}"
        )
        return None
    return rules[resample]


def weight_dtype(backbone):
    """Return the dtype of the weights under a backbone's dtype policy."""
    name = backbone.dtype or "float32"
    return "float32" if name.startswith("mixed_") else name


def to_json(content):
    """Return the bytes of a JSON file in transformers' style."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def to_transformers(config, num_rows):
    """Convert our config to the files of transformers.

    Args:
        config: `ModelConfig`.
        num_rows: int, rows of the embedding in the file.

    Returns:
        dict of file name to content, a dict.

    Raises:
        ValueError: listing all fields that transformers cannot express.
    """
    backbone = config.backbone
    text, vision = backbone.text_decoder, backbone.vision_encoder
    _check_expressible(backbone)
    image_size, width = backbone.image_size, text.hidden_dim
    num_image_tokens = backbone.num_image_tokens()
    dtype = weight_dtype(backbone)
    special_ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text_config = {
        "model_type": "gemma2" if text.use_post_norms else "gemma",
        "vocab_size": num_rows,
        **{key: getattr(text, name) for name, key in TEXT_FIELDS.items()},
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": GEMMA["max_position_embeddings"],
        "num_image_tokens": num_image_tokens,
        "rope_theta": text.rope_base,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
    }
    if text.use_post_norms:
        text_config |= {
            # Versions since 5 accept only integers.
            "query_pre_attn_scalar": int(text.query_pre_attention_scalar),
            "attn_logit_softcapping": text.attention_logit_soft_cap,
            "final_logit_softcapping": text.final_logit_soft_cap,
            # A window is required; this one covers the whole context.
            "sliding_window": GEMMA["max_position_embeddings"],
        }
    files = {
        "config.json": {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            **special_ids,
            # Early versions scale image tokens by this field.
            "hidden_size": width,
            "ignore_index": -100,
            "image_token_index": text.vocabulary_size,
            "projection_dim": width,
            "text_config": text_config,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
            "vision_config": {
                "model_type": "siglip_vision_model",
                **{
                    key: getattr(vision, name)
                    for name, key in VISION_FIELDS.items()
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
    if config.preprocessor is not None:
        files["preprocessor_config.json"] = {
            "do_convert_rgb": True,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": num_image_tokens,
            "processor_class": "PaliGemmaProcessor",
            **{name: values[0] for name, values in PROCESSOR_FIXED.items()},
            "resample": _resample(config.preprocessor.resize),
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


def _check_expressible(backbone):
    """Raise if transformers has no config for a model."""
    text = backbone.text_decoder
    scalar = text.query_pre_attention_scalar
    wanted = {
        "dtype of float32, float16, bfloat16 or mixed": (
            weight_dtype(backbone) in DTYPES
        ),
        "no adapters: merge them first": backbone.lora is None,
        # In transformers, a prompt attends to all of itself despite a window.
        "sliding_window_size=None": text.sliding_window_size is None,
    }
    if text.use_post_norms:
        wanted |= {
            "a whole query_pre_attention_scalar": scalar == int(scalar),
            "hidden_dim that num_query_heads divides": (
                text.hidden_dim % text.num_query_heads == 0
            ),
        }
    else:
        wanted |= {
            "without post norms, query_pre_attention_scalar=head_dim": (
                scalar == text.head_dim
            ),
            "without post norms, no soft cap": (
                text.attention_logit_soft_cap is None
                and text.final_logit_soft_cap is None
            ),
        }
    lacking = [name for name, holds in wanted.items() if not holds]
    if lacking:
        raise ValueError(
            "transformers cannot express this model. Expected: "
            f"{'; '.join(lacking)}. Received: {backbone}."
        )
