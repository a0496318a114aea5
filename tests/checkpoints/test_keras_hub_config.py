"""The configuration of KerasHub's presets: read, written and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.keras_hub import config as keras_hub_config
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.lora_config import LoraConfig
from tests.helpers.keras_hub_reference import PREPROCESSOR
from tests.helpers.keras_hub_reference import expected_config
from tests.helpers.keras_hub_reference import tokenizer
from tests.helpers.tiny_models import GOLDEN

PUBLISHED = [
    name for name in presets.names() if "handles" in presets.describe(name)
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_models(name, tmp_path):
    backbone = replace(presets.config(name).backbone, dtype="bfloat16")
    config = ModelConfig(backbone=backbone)
    content = keras_hub_config.files(config)["config.json"]
    (tmp_path / "config.json").write_bytes(content)
    found = keras_hub_config.read(tmp_path, load_weights=False)
    assert found.config == config
    theirs = json.loads(content)["config"]
    assert theirs["query_head_dim_normalize"] == ("28b" not in name)
    assert theirs["use_post_ffw_norm"] == ("gemma2" in name or "_2_" in name)
    if "28b" in name:
        assert theirs["intermediate_dim"] == 73_728


def tiny_config():
    return ModelConfig(backbone=expected_config(2), preprocessor=PREPROCESSOR)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("query_pre_attention_scalar", 20, "expected head_dim"),
        ("rope_base", 1e6, "rope_base=1000000.0, expected"),
        ("rms_norm_epsilon", 1e-5, "rms_norm_epsilon=1e-05"),
        ("layer_norm_epsilon", 1e-5, "layer_norm_epsilon="),
        ("lora", LoraConfig(4), "lora"),
    ],
)
def test_what_kerashub_lacks_is_refused(tmp_path, key, value, says):
    config = tiny_config()
    if key == "lora":
        backbone = replace(config.backbone, lora=value)
    else:
        backbone = config.backbone.with_fields(**{key: value})
    config = replace(config, backbone=backbone)
    with pytest.raises(ValueError, match=says):
        keras_hub.write(tmp_path / "new", config, iter([]), tokenizer())
    assert not list(tmp_path.iterdir())


def test_what_else_is_refused_when_writing(tmp_path):
    toy = (GOLDEN / "toy_sp.model").read_bytes()
    with pytest.raises(ValueError, match="no piece <bos>, <eos>"):
        keras_hub.write(tmp_path / "new", tiny_config(), iter([]), toy)
    with pytest.raises(ValueError, match="go together"):
        keras_hub.write(tmp_path / "new", tiny_config(), iter([]))
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="a new or an empty folder"):
        keras_hub.write(tmp_path, tiny_config(), iter([]), tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def arrays():
        yield "vars/0", np.zeros(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keras_hub.write(tmp_path / "new", tiny_config(), arrays(), tokenizer())
    assert not list(tmp_path.iterdir())


def write_files(folder, change):
    """Write a folder in which `change` has changed the parsed files."""
    config = tiny_config()
    files = keras_hub_config.files(config, tokenizer())
    parsed = {
        name: json.loads(content)
        for name, content in files.items()
        if str(name).endswith(".json")
    }
    change(parsed)
    for name, content in parsed.items():
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"registered_name": "keras_hub>GemmaBackbone"}, "PaliGemmaBackbone"),
        ({"registered_name": "mine>PaliGemmaBackbone"}, "Expected: 'keras_hub"),
        ({"model_type": "paligemma", "registered_name": None}, "=None"),
        ({"config": {}}, "num_layers is missing"),
        ({"num_layers": "3"}, "num_layers must be an integer .* received '3'"),
        ({"num_layers": 10_000_000}, "num_layers must be an integer of 1 to"),
        ({"vit_patch_size": False}, "vit_patch_size must .* received False"),
        ({"final_logit_soft_cap": {}}, "final_logit_soft_cap must be a number"),
        ({"use_post_ffw_norm": []}, "use_post_ffw_norm must be True or False"),
        ({"query_head_dim_normalize": "no"}, "'no', expected True or False"),
        ({"vit_pooling": "map"}, "vit_pooling='map', expected None"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ({"dropout": 0.1}, "dropout=0.1"),
        (
            {"use_post_ffw_norm": False},
            "use_post_attention_norm=True, expected",
        ),
        ({"vision_model": "new"}, "vision_model is unknown"),
        ({"dtype": {"class_name": "DTypePolicyMap"}}, "quantized"),
    ],
)
def test_other_configs_are_refused(tmp_path, changes, says):
    def change(files):
        config = files["config.json"]
        for key, value in changes.items():
            outer = key in config or key == "model_type"
            (config if outer else config["config"])[key] = value

    write_files(tmp_path, change)
    with pytest.raises(ValueError, match=says) as caught:
        keras_hub_config.read(tmp_path, load_weights=False)
    assert "config.json" in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="config.json cannot be read .*No"):
        keras_hub_config.read(tmp_path)
    write_files(tmp_path, lambda files: None)
    with pytest.raises(ValueError, match="lacks its weights"):
        keras_hub_config.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        keras_hub_config.read(tmp_path)


def test_older_files(tmp_path):
    """Read presets from before KerasHub added and renamed some fields."""

    def change(files):
        fields = files["config.json"]["config"]
        for key in list(fields):
            if key in keras_hub_config.DEFAULTS or key == "dtype":
                del fields[key]
        files["config.json"]["registered_name"] = "keras_nlp>PaliGemmaBackbone"
        del files["preprocessor.json"]
        converter = files["image_converter.json"]["config"]
        del converter["offset"]
        del converter["crop_to_aspect_ratio"]
        converter |= {"scale": 1 / 255, "mean": [0.5] * 3}
        converter["variance"] = [0.25] * 3

    write_files(tmp_path, change)
    found = keras_hub_config.read(tmp_path, load_weights=False)
    wanted = expected_config(1)
    vision = replace(wanted.vision_encoder, intermediate_dim=4304)
    assert found.config.backbone == replace(wanted, vision_encoder=vision)
    assert found.config.preprocessor == PreprocessorConfig("bilinear")


def test_a_tokenizer_without_a_preprocessor(tmp_path):
    write_files(tmp_path, lambda files: None)
    for name in ("preprocessor.json", "image_converter.json"):
        (tmp_path / name).unlink()
    found = formats.find(tmp_path, load_weights=False)
    assert found.config.preprocessor is None
    path = tmp_path / keras_hub_config.TOKENIZER
    path.parent.mkdir(parents=True)
    path.write_bytes(tokenizer())
    found = formats.find(tmp_path, load_weights=False)
    assert found.config.preprocessor == PreprocessorConfig("bilinear_antialias")
    assert "Taken: resize='bilinear_antialias'" in found.assumed["resize"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 1 / 255, "offset": None}, "scale and offset"),
        ({"offset": 0.0}, "scale and offset"),
        ({"offset": {}}, "scale and offset"),
        ({"scale": "x"}, "scale and offset"),
        ({"scale": 10**400}, "scale and offset"),
        ({"mean": [], "variance": -1}, "scale and offset"),
        ({"interpolation": ["bilinear"]}, "expected one of"),
        ({"interpolation": "lanczos5"}, "interpolation='lanczos5'"),
        ({"interpolation": "bicubic"}, "antialias=False"),
    ],
)
def test_other_pixels_are_refused(tmp_path, changes, says):
    def change(files):
        converter = files["preprocessor.json"]["config"]["image_converter"]
        converter["config"] |= changes

    write_files(tmp_path, change)
    with pytest.raises(ValueError, match=says):
        keras_hub_config.read(tmp_path, load_weights=False)
