"""Conversion between KerasHub's configuration of PaliGemma and ours."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_paligemma.checked import shown
from keras_paligemma.checkpoints.storage import h5
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig
from keras_paligemma.config import read_json

CONFIG = "config.json"
PREPROCESSOR = "preprocessor.json"
IMAGE_CONVERTER = "image_converter.json"
TOKENIZER = Path("assets", "tokenizer", "vocabulary.spm")

# Our fields, and their names in KerasHub.
VISION_FIELDS = {
    "patch_size": "vit_patch_size",
    "num_layers": "vit_num_layers",
    "hidden_dim": "vit_hidden_dim",
    "num_heads": "vit_num_heads",
    "intermediate_dim": "vit_intermediate_dim",
}
# Fields of the decoder with equal names.
TEXT_FIELDS = (
    "vocabulary_size",
    "num_layers",
    "hidden_dim",
    "num_query_heads",
    "num_key_value_heads",
    "head_dim",
)
SOFT_CAPS = ("attention_logit_soft_cap", "final_logit_soft_cap")

REQUIRED = (*TEXT_FIELDS, *VISION_FIELDS.values(), "image_size")
REQUIRED += ("intermediate_dim",)
# Fields of the decoder, by their names in KerasHub.
TEXT_NAMES = {key: key for key in (*TEXT_FIELDS, *SOFT_CAPS)}
TEXT_NAMES |= {
    "intermediate_dim": "intermediate_dim",
    "use_post_norms": "use_post_ffw_norm",
    "sliding_window_size": "sliding_window_size",
}
# KerasHub's defaults for fields that files of older versions lack.
DEFAULTS = {
    "vit_intermediate_dim": 4304,
    "vit_pooling": None,
    "vit_classifier_activation": None,
    "query_head_dim_normalize": True,
    "use_post_ffw_norm": False,
    "use_post_attention_norm": False,
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "use_sliding_window_attention": False,
    "sliding_window_size": 4096,
    "layer_norm_epsilon": 1e-6,
    "dropout": 0,
}
# Fields that this package lacks must have these values.
EPSILON = 1e-6
ROPE_BASE = 10_000.0
FIXED = {
    "vit_pooling": (None,),
    "vit_classifier_activation": (None, "linear"),
    # KerasHub's blocks use 1e-6, whatever this field says.
    "layer_norm_epsilon": (EPSILON,),
    "dropout": (0,),
}
# Fields that do not change results.
NAMES = ("name", "trainable", "dtype", "vit_name")

# KerasHub's interpolation and antialias, to the resize rules of our converter.
RESIZES = {
    "bilinear": ("bilinear", False),
    "bilinear_antialias": ("bilinear", True),
    "bicubic": ("bicubic", True),
}
# KerasHub's classes, by the last part of the module's name.
CLASSES = {
    "backbone": "PaliGemmaBackbone",
    "causal_lm": "PaliGemmaCausalLM",
    "causal_lm_preprocessor": "PaliGemmaCausalLMPreprocessor",
    "image_converter": "PaliGemmaImageConverter",
    "tokenizer": "PaliGemmaTokenizer",
}
SPECIAL_PIECES = ("<pad>", "<bos>", "<eos>")


class Description(NamedTuple):
    """The content of a preset folder without its values.

    Args:
        config: `ModelConfig`. `query_pre_attention_scalar` is the original's:
            hidden_dim / num_query_heads if `query_head_dim_normalize` is
            false (28b: 144). KerasHub 0.32 ignores that field and runs such a
            model with head_dim (128). The preprocessor, if there is one, has
            the resize rule: KerasHub can crop or pad pictures; the original
            stretches.
        tokenizer: `pathlib.Path` of the SentencePiece file, or `None`.
        weights: list of paths for `open_h5`; empty without weights.
    """

    config: ModelConfig
    tokenizer: Path | None
    weights: list


def read(folder, load_weights=True):
    """Read the configuration of a preset folder of KerasHub.

    Args:
        folder: path.
        load_weights: bool, whether weights are required.

    Returns:
        `Description`.

    Raises:
        ValueError: no such preset, or one with features that this package
            lacks.
    """
    folder = Path(folder)
    path = folder / CONFIG
    given = _fields(read_json(path), "backbone", path)
    weights = [folder / h5.SINGLE, folder / h5.INDEX]
    weights = [file for file in weights if file.is_file()]
    if load_weights and not weights:
        raise ValueError(
            f"{folder} lacks its weights. Expected: {h5.SINGLE}, or "
            f"{h5.INDEX} and its shards. Copy all of the folder."
        )
    tokenizer = folder / TOKENIZER
    config = ModelConfig(
        backbone=_backbone(given, path), preprocessor=_preprocessor(folder)
    )
    return Description(
        config,
        tokenizer if tokenizer.is_file() else None,
        # Like KerasHub, prefer the single file if both exist.
        weights[:1],
    )


def _backbone(given, path):
    dtype = given.get("dtype")
    given = DEFAULTS | given
    if given["vit_intermediate_dim"] is None:
        given["vit_intermediate_dim"] = DEFAULTS["vit_intermediate_dim"]
    problems = _misfits(given)
    if isinstance(dtype, dict):
        if dtype.get("class_name") != "DTypePolicy":
            name = shown(dtype.get("class_name"))
            problems.append(f"dtype is a {name}: quantized")
        fields = dtype.get("config")
        dtype = fields.get("name") if isinstance(fields, dict) else dtype
    _refuse(problems, f"{path} is no model that this package can build")
    text = {name: given[key] for name, key in TEXT_NAMES.items()}
    # KerasHub's size is that of gate and up together.
    text["intermediate_dim"] //= 2
    scalar = given["head_dim"]
    if not given["query_head_dim_normalize"]:
        scalar = given["hidden_dim"] / given["num_query_heads"]
    if not given["use_sliding_window_attention"]:
        text["sliding_window_size"] = None
    vision = {name: given[key] for name, key in VISION_FIELDS.items()}
    fields = {
        "image_size": given["image_size"],
        # Files of older versions lack this field.
        "dtype": dtype or "float32",
        "vision_encoder": vision | {"layer_norm_epsilon": EPSILON},
        "text_decoder": text
        | {
            "query_pre_attention_scalar": scalar,
            "rope_base": ROPE_BASE,
            "rms_norm_epsilon": EPSILON,
        },
    }
    return BackboneConfig.from_dict(fields, path)


def _misfits(given):
    """List fields that are missing, unknown or of an unsupported value."""
    known = {*REQUIRED, *DEFAULTS, *NAMES}
    problems = [f"{key} is missing" for key in REQUIRED if key not in given]
    problems += [
        f"{key:.80} is unknown" for key in sorted(given.keys() - known)
    ]
    # Missing fields are already listed.
    parts = [
        (BackboneConfig, {"image_size": "image_size"}),
        (VisionEncoderConfig, VISION_FIELDS),
        (TextDecoderConfig, TEXT_NAMES),
    ]
    for part, names in parts:
        values = {
            name: given[key] for name, key in names.items() if key in given
        }
        problems += part.problems(values, names)
    expected = FIXED | {
        "query_head_dim_normalize": (True, False),
        "use_sliding_window_attention": (True, False),
        "use_post_attention_norm": (given["use_post_ffw_norm"],),
    }
    return problems + [
        f"{key}={shown(given[key])}, expected "
        f"{' or '.join(map(shown, allowed))}"
        for key, allowed in expected.items()
        if given[key] not in allowed
    ]


def _preprocessor(folder):
    """Read KerasHub's preprocessor; return `None` if there is none."""
    path = folder / PREPROCESSOR
    if path.is_file():
        fields = _fields(read_json(path), "causal_lm_preprocessor", path)
        converter = fields.get("image_converter")
    else:
        path = folder / IMAGE_CONVERTER
        converter = read_json(path) if path.is_file() else None
    if converter is None:
        return None
    fields = _fields(converter, "image_converter", path)
    interpolation = fields.get("interpolation", "bilinear")
    antialias = bool(fields.get("antialias", False))
    resize = [
        name
        for name, how in RESIZES.items()
        if how == (interpolation, antialias)
    ]
    problems = []
    if not resize:
        problems.append(
            f"interpolation={shown(interpolation)} with antialias={antialias}, "
            f"expected one of {list(RESIZES.values())}"
        )
    if not _gives_minus_one_to_one(fields):
        problems.append("scale and offset do not turn 0…255 into [-1, 1]")
    _refuse(problems, f"{path} prepares pictures as this package cannot")
    return PreprocessorConfig(resize[0])


def _gives_minus_one_to_one(fields):
    try:
        # Values that give NaN are wrong too, without a warning.
        with np.errstate(all="ignore"):
            ends = _ends(fields)
    except (TypeError, ValueError, OverflowError):
        return False
    return np.allclose(ends, [[-1.0], [1.0]], atol=1e-3)


def _ends(fields):
    """Return the converted values of the pixels 0 and 255, by channel."""
    scale, offset = _channels(fields, "scale"), _channels(fields, "offset")
    if "variance" in fields and "mean" in fields:
        # Names of older versions, which KerasHub still reads.
        deviation = np.sqrt(_channels(fields, "variance"))
        scale = scale / deviation
        offset = -_channels(fields, "mean") / deviation
    return np.array([[0.0], [255.0]]) * scale + offset


def _channels(fields, name):
    """Return a number, or one per channel, as three floats; `None` as NaN."""
    array = np.array(fields.get(name), "float64")
    return np.broadcast_to(array, (3,))


def _fields(content, part, path):
    """Return the arguments of a serialized object of KerasHub."""
    name = CLASSES[part]
    content = content if isinstance(content, dict) else {}
    registered = content.get("registered_name")
    expected = [f"{package}>{name}" for package in ("keras_hub", "keras_nlp")]
    fields = content.get("config")
    if registered not in expected or not isinstance(fields, dict):
        raise ValueError(
            f"{path} is no config of KerasHub's {name}. Received: "
            f"registered_name={shown(registered)}. Expected: {expected[0]!r}."
        )
    return fields


def _refuse(problems, what):
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}.")


def files(config, tokenizer=None):
    """Return all files of a preset, except the weights and `metadata.json`.

    Args:
        config: `ModelConfig`.
        tokenizer: bytes of the SentencePiece model, or `None`.

    Returns:
        dict of name to bytes.

    Raises:
        ValueError: a config that KerasHub cannot express.
    """
    backbone, preprocessor = config.backbone, config.preprocessor
    problems = _inexpressible(backbone)
    if (tokenizer is None) != (preprocessor is None):
        problems.append("tokenizer and preprocessor go together")
    if tokenizer is not None:
        missing = [p for p in SPECIAL_PIECES if p.encode() not in tokenizer]
        if missing:
            problems.append(f"the tokenizer has no piece {', '.join(missing)}")
    _refuse(problems, "KerasHub has no fields for this model")
    model = _serialized("backbone", _their_backbone(backbone))
    content = {CONFIG: model}
    if preprocessor is not None:
        content |= _preprocessing(preprocessor, backbone.image_size)
        task = {
            "backbone": model,
            "preprocessor": content[PREPROCESSOR],
            "name": "pali_gemma_causal_lm",
        }
        content["task.json"] = _serialized("causal_lm", task)
    written = {name: to_json(document) for name, document in content.items()}
    return written if tokenizer is None else written | {TOKENIZER: tokenizer}


def _inexpressible(backbone):
    """List the fields whose values KerasHub does not support."""
    text, vision = backbone.text_decoder, backbone.vision_encoder
    scalar = text.query_pre_attention_scalar
    scalars = [text.head_dim, text.hidden_dim / text.num_query_heads]
    problems = []
    if scalar not in scalars:
        problems.append(
            f"query_pre_attention_scalar={scalar}, expected head_dim or "
            f"hidden_dim / num_query_heads, {scalars}"
        )
    for key, value, expected in (
        ("rope_base", text.rope_base, ROPE_BASE),
        ("rms_norm_epsilon", text.rms_norm_epsilon, EPSILON),
        ("layer_norm_epsilon", vision.layer_norm_epsilon, EPSILON),
    ):
        if value != expected:
            problems.append(f"{key}={value}, expected {expected}")
    if backbone.lora is not None:
        problems.append("lora: its adapters are of another form")
    return problems


def _their_backbone(backbone):
    text, vision = backbone.text_decoder, backbone.vision_encoder
    post_norms, window = text.use_post_norms, text.sliding_window_size
    return {
        "name": "pali_gemma_backbone",
        "trainable": True,
        "dtype": {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": backbone.dtype},
            "registered_name": None,
        },
        **{key: getattr(text, key) for key in (*TEXT_FIELDS, *SOFT_CAPS)},
        **{key: getattr(vision, name) for name, key in VISION_FIELDS.items()},
        "image_size": backbone.image_size,
        "intermediate_dim": 2 * text.intermediate_dim,
        "query_head_dim_normalize": (
            text.query_pre_attention_scalar == text.head_dim
        ),
        "use_post_ffw_norm": post_norms,
        "use_post_attention_norm": post_norms,
        "use_sliding_window_attention": window is not None,
        "sliding_window_size": (
            DEFAULTS["sliding_window_size"] if window is None else window
        ),
        "layer_norm_epsilon": EPSILON,
    }


def _preprocessing(preprocessor, image_size):
    interpolation, antialias = RESIZES[preprocessor.resize]
    tokenizer = {"config_file": "tokenizer.json", "proto": None}
    image_converter = {
        "image_size": [image_size, image_size],
        "scale": 1 / 127.5,
        "offset": -1.0,
        "interpolation": interpolation,
        "antialias": antialias,
        "crop_to_aspect_ratio": False,
    }
    tokenizer = _serialized("tokenizer", tokenizer)
    image_converter = _serialized("image_converter", image_converter)
    both = {
        "tokenizer": tokenizer,
        "image_converter": image_converter,
        "config_file": PREPROCESSOR,
        # KerasHub has one length for prompt and response.
        "sequence_length": (
            preprocessor.prompt_length + preprocessor.response_length
        ),
    }
    return {
        "tokenizer.json": tokenizer,
        IMAGE_CONVERTER: image_converter,
        PREPROCESSOR: _serialized("causal_lm_preprocessor", both),
    }


def _serialized(part, fields):
    """Return an object in Keras's serialized form; `part` names its file."""
    module = f"keras_hub.src.models.pali_gemma.pali_gemma_{part}"
    name = CLASSES[part]
    return {
        "module": module,
        "class_name": name,
        "config": fields,
        "registered_name": f"keras_hub>{name}",
    }


def to_json(content):
    """Return the bytes of a JSON file in KerasHub's style."""
    return (json.dumps(content, indent=4) + "\n").encode()
