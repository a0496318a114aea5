"""Tiny KerasHub models in their own process, and their outputs.

The first functional model of KerasHub in a process changes the bases of a class
that it shares with our models. KerasHub therefore runs in another process, so
that neither depends on the state that the other leaves behind:

    python -m tests.helpers.keras_hub_reference make FOLDER
    python -m tests.helpers.keras_hub_reference read FOLDER…

`make` saves presets, each with an `.npz` of weights and outputs. `read` loads
presets and saves the same data for each.
"""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops
from sentencepiece import sentencepiece_model_pb2

from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import run

# With these caps and this window, results change at this size.
SECOND = {
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "sliding_window_size": 6,
    "use_post_norms": True,
}
FIRST = {
    "attention_logit_soft_cap": None,
    "final_logit_soft_cap": None,
    "sliding_window_size": None,
    "use_post_norms": False,
}
# Fields that both models share, by KerasHub's names.
HUB = {
    "vocabulary_size": 320,
    "image_size": 42,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 224,
    "head_dim": 24,
    "vit_patch_size": 14,
    "vit_num_heads": 4,
    "vit_hidden_dim": 48,
    "vit_num_layers": 3,
    "vit_intermediate_dim": 88,
}
HUB_SECOND = HUB | {
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 6,
}
# In bytes: smaller than the tiny model and larger than its largest array.
SHARD_SIZE = 120_000
PREPROCESSOR = PreprocessorConfig("bilinear", 12, 8)


def expected_config(version, dtype="float32"):
    """Return a model's config by this package's names."""
    return BackboneConfig(
        image_size=IMAGE_SIZE,
        dtype=dtype,
        vision_encoder=VisionEncoderConfig(**VISION),
        text_decoder=TextDecoderConfig(
            **TEXT | (FIRST if version == 1 else SECOND)
        ),
    )


def tokenizer():
    """Return the toy tokenizer with Gemma's names for the special pieces."""
    proto = (GOLDEN / "toy_sp.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    model.pieces[1].piece, model.pieces[2].piece = "<eos>", "<bos>"
    return model.SerializeToString()


def make_inputs():
    """Return two rows with padding on the right, and the valid positions.

    KerasHub's rotary positions count padding, and its padding attends to other
    tokens than ours. With padding at the end, the valid positions agree.
    """
    random = np.random.default_rng(7)
    valid = np.array([[1] * 9, [1] * 6 + [0] * 3], bool)
    response = np.array([[0] * 5 + [1] * 4, [0] * 4 + [1] * 2 + [0] * 3], bool)
    inputs = {
        "images": random.uniform(-1, 1, (2, 42, 42, 3)).astype("float32"),
        "token_ids": random.integers(1, 320, valid.shape).astype("int32"),
        "padding_mask": valid,
        "response_mask": response,
    }
    return inputs, np.pad(valid, ((0, 0), (9, 0)), constant_values=True)


def in_a_process(*args):
    """Run this file in a process, with arguments."""
    result = subprocess.run(
        [sys.executable, "-m", __name__, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-4000:]


def _backbone(seed, **fields):
    """Build KerasHub's backbone; no weight keeps an initial zero or one."""
    from keras_hub.models import PaliGemmaBackbone

    keras.utils.set_random_seed(seed)
    model = PaliGemmaBackbone(**fields)
    random = np.random.default_rng(seed)
    for variable in model.variables:
        noise = 0.1 * random.normal(size=variable.shape)
        value = ops.convert_to_numpy(ops.cast(variable, "float32")) + noise
        variable.assign(value.astype("float32"))
    return model


def _save(path, model, **more):
    """Save weights, config and outputs at valid positions."""
    inputs, valid = make_inputs()
    for key in ("padding_mask", "response_mask"):
        inputs[key] = inputs[key].astype("int32")
    hidden = run(model, inputs)
    outputs = {
        "hidden": hidden,
        "logits": model.token_embedding(hidden, reverse=True),
    }
    # Layer names depend on the layers built before.
    weights = {
        f"weights/{number}": _numpy(variable)
        for number, variable in enumerate(model.variables)
    }
    config = model.get_config() | {"name": "", "dtype": ""}
    np.savez(
        f"{path}.npz",
        config=json.dumps(config, sort_keys=True),
        **{key: _numpy(value)[valid] for key, value in outputs.items()},
        **weights,
        **more,
    )


def _numpy(value):
    return ops.convert_to_numpy(ops.cast(value, "float32"))


def _make(folder):
    for version, fields in enumerate((HUB, HUB_SECOND), 1):
        model = _backbone(version, **fields)
        model.save_to_preset(folder / f"single{version}")
        size = SHARD_SIZE / 2**30
        model.save_to_preset(folder / f"sharded{version}", max_shard_size=size)
        _save(folder / f"single{version}", model)
    other = _backbone(2, **HUB_SECOND, query_head_dim_normalize=False)
    other.set_weights(model.get_weights())
    other.save_to_preset(folder / "scale")
    _save(folder / "scale", other)
    model = _backbone(2, **HUB_SECOND, dtype="bfloat16")
    model.save_to_preset(folder / "bfloat16")
    _save(folder / "bfloat16", model)


def _read(folder):
    from keras_hub.models import PaliGemmaBackbone
    from keras_hub.models import PaliGemmaCausalLM

    model = PaliGemmaBackbone.from_preset(str(folder))
    _save(folder, model)
    if not (folder / "task.json").exists():
        return
    task = PaliGemmaCausalLM.from_preset(str(folder))
    picture = np.zeros((2, 21, 42, 3), "uint8")
    picture[:, :, 10:] = 255
    x = task.preprocessor.generate_preprocess(
        {"images": picture, "prompts": ["detect cat", "caption en"]}
    )
    _save(
        f"{folder}.task",
        task.backbone,
        images=ops.convert_to_numpy(x["images"]),
        token_ids=ops.convert_to_numpy(x["token_ids"]),
    )


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    for path in paths:
        {"make": _make, "read": _read}[command](Path(path))
