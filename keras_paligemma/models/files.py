"""Models to preset folders and back."""

import os
from pathlib import Path

import numpy as np
from keras import ops
from safetensors.numpy import save_file

from keras_paligemma import presets
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.safetensors_files import open_safetensors
from keras_paligemma.compat import without_values


def load_backbone(cls, config, folder, load_weights, dtype=None, **kwargs):
    """Build a backbone from a preset's config and fill it from its folder.

    Args:
        cls: the backbone's class.
        config: dict, of `presets.resolve`.
        folder: path or `None`.
        load_weights: bool; `False` draws random weights.
        dtype: dtype policy, or `None` for the one that was saved.
        **kwargs: `form`, `remat`, `name`.

    Returns:
        Instance of `cls`.
    """
    fields = dict(config["backbone"])
    dtype = dtype or fields.pop("dtype", None)
    fields |= {"dtype": dtype} | kwargs
    if not load_weights:
        return cls(**fields)
    # Each weight arrives once: cast and placed as it is read, with no random
    # value before it.
    with without_values():
        backbone = cls(**fields)
    weights = backbone.weights_by_name()
    rows = [engine.Row(name, name) for name in weights]
    with open_safetensors([folder / presets.WEIGHTS]) as tensors:
        engine.load(weights, rows, tensors)
    return backbone


def load_task(cls, preset, load_weights, dtype, kwargs):
    """Build a task with its backbone and preprocessor from a preset."""
    config, folder = presets.resolve(preset, load_weights)
    backbone_keys = ("form", "remat")
    task_keys = ("compile", "name", "preprocessor")
    backbone = load_backbone(
        cls.backbone_cls,
        config,
        folder,
        load_weights,
        dtype,
        **{key: kwargs.pop(key) for key in backbone_keys if key in kwargs},
    )
    task = {key: kwargs.pop(key) for key in task_keys if key in kwargs}
    if "preprocessor" not in task:
        task["preprocessor"] = cls.preprocessor_cls.from_files(
            config, folder, **kwargs
        )
    return cls(backbone, **task)


def save(folder, backbone, preprocessor=None, name=None):
    """Write a preset folder; what stands there is replaced file by file.

    Args:
        folder: str or path.
        backbone: `PaliGemmaBackbone`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`.
        name: str or `None`, the name in the config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for key, weight in backbone.weights_by_name().items():
        if isinstance(weight, list):
            arrays[key] = np.stack([ops.convert_to_numpy(w) for w in weight])
        else:
            arrays[key] = np.ascontiguousarray(ops.convert_to_numpy(weight))
    # Written beside and then renamed, the config last: a folder never holds
    # half a file, and a reader never finds a config without its weights.
    draft = folder / f"{presets.WEIGHTS}.{os.getpid()}"
    save_file(arrays, draft)
    # safetensors lets nobody else read what it writes.
    draft.chmod(0o644)
    os.replace(draft, folder / presets.WEIGHTS)
    fields = None
    if preprocessor is not None:
        draft = folder / f"{presets.TOKENIZER}.{os.getpid()}"
        draft.write_bytes(preprocessor.tokenizer.proto)
        os.replace(draft, folder / presets.TOKENIZER)
        fields = {
            "resize": preprocessor.image_converter.resize,
            "prompt_length": preprocessor.prompt_length,
            "response_length": preprocessor.response_length,
            "on_long_prompt": preprocessor.on_long_prompt,
            "on_long_response": preprocessor.on_long_response,
        }
    config = {
        "name": name or folder.resolve().name,
        "backbone": backbone.architecture(),
        "preprocessor": fields,
    }
    presets.write_config(folder, config)
