"""Configurations from any source: types, ranges and consistency."""

import dataclasses
import json
import math

import numpy as np
import pytest

from keras_paligemma import config as configs
from keras_paligemma import presets
from keras_paligemma.config import BackboneConfig
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig
from keras_paligemma.config import read_json
from keras_paligemma.lora_config import LoraConfig

PARTS = [
    VisionEncoderConfig(),
    TextDecoderConfig(),
    LoraConfig(8, 16.0, ("query",), 0.1, True),
    BackboneConfig(lora=LoraConfig(4), quantization="int4", dtype="bfloat16"),
    PreprocessorConfig("bicubic"),
    ModelConfig(
        name="tiny",
        backbone=BackboneConfig(448),
        preprocessor=PreprocessorConfig("bilinear", 16, 32, "truncate"),
    ),
]
each = pytest.mark.parametrize(
    "part", PARTS, ids=lambda part: type(part).__name__
)


@each
def test_there_and_back_through_json(part):
    text = json.dumps(part.to_dict())
    assert type(part).from_dict(json.loads(text)) == part
    assert len({part, type(part).from_dict(part.to_dict())}) == 1


@each
def test_each_field_says_what_it_may_be(part):
    """No field accepts values of every type."""
    for field in dataclasses.fields(part):
        for value in (math.nan, [[1]], object()):
            values = part.to_dict() | {field.name: value}
            with pytest.raises(ValueError) as raised:
                type(part).from_dict(values, "here")
            assert str(raised.value).startswith("here is no configuration")
            assert f"{field.name} must be" in str(raised.value)
            with pytest.raises(ValueError, match=f"{field.name} must be"):
                dataclasses.replace(part, **{field.name: value})


@pytest.mark.parametrize("name", presets.names())
def test_published_models_are_within_the_ranges(name):
    assert presets.config(name).backbone.num_image_tokens() in (
        64,
        256,
        1024,
        4096,
    )


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (VisionEncoderConfig, {"patch_size": False}, "of 1 to 1024.* False"),
        (VisionEncoderConfig, {"num_layers": 10_000_000}, "of 1 to 512"),
        (VisionEncoderConfig, {"num_layers": 0}, "received 0"),
        (VisionEncoderConfig, {"num_layers": 3.0}, "received 3.0"),
        (VisionEncoderConfig, {"layer_norm_epsilon": "1e-6"}, "'1e-6'"),
        (VisionEncoderConfig, {"num_heads": 5}, "multiple of its heads"),
        (TextDecoderConfig, {"final_logit_soft_cap": math.inf}, "inf"),
        (TextDecoderConfig, {"final_logit_soft_cap": 0}, "or None, received 0"),
        (TextDecoderConfig, {"use_post_norms": 1}, "True or False, received 1"),
        (TextDecoderConfig, {"rope_base": 10**400}, "rope_base must be"),
        (TextDecoderConfig, {"rope_base": 0.5}, "of 1 to .*received 0.5"),
        (TextDecoderConfig, {"rms_norm_epsilon": True}, "received True"),
        (TextDecoderConfig, {"head_dim": 5}, "must be even"),
        (TextDecoderConfig, {"num_query_heads": 6}, "heads=6, .*heads=4"),
        (TextDecoderConfig, {"num_query_heads": 2}, "key-value heads"),
        (TextDecoderConfig, {"depth": 5}, "depth is unknown"),
        (LoraConfig, {}, "rank is missing"),
        (LoraConfig, {"rank": 4, "alpha": "x"}, "alpha must be a number"),
        (LoraConfig, {"rank": 4, "alpha": 1e-300}, "received 1e-300"),
        (LoraConfig, {"rank": 4, "alpha": -1e31}, r"received -1e\+31"),
        (LoraConfig, {"rank": 4, "targets": "query"}, "a list of strings"),
        (BackboneConfig, {"lora": 1e-300}, "lora must be an object of fields"),
        (BackboneConfig, {"lora": {"rank": []}}, r"lora.rank must .* \[\]"),
        (BackboneConfig, {"dtype": "float7"}, "received 'float7'"),
        (BackboneConfig, {"image_size": 225}, "here: .*225, patch_size=14"),
        (BackboneConfig, {"vision_encoder": {"num_heads": 5}}, "here: .*heads"),
        (ModelConfig, [], "backbone is missing"),
        (BackboneConfig, [], r"here is no .*an object of fields, not \[\]"),
        (TextDecoderConfig, "x", "it must be an object of fields, not 'x'"),
        (TextDecoderConfig, 5, "it must be an object of fields, not 5"),
        (PreprocessorConfig, {"resize": []}, r"'bicubic', received \[\]"),
        (PreprocessorConfig, {"resize": None}, "received None"),
        (
            PreprocessorConfig,
            {"resize": "bicubic", "prompt_length": 2},
            "of 3 to",
        ),
    ],
)
def test_wrong_values(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls.from_dict(values, "here")


def test_limits_are_valid():
    assert LoraConfig(1, -1e30).alpha == -1e30
    assert PreprocessorConfig("bicubic", 3, 1_048_576).prompt_length == 3
    assert TextDecoderConfig(rope_base=1, rms_norm_epsilon=1).rope_base == 1
    assert VisionEncoderConfig(patch_size=1024, num_layers=1).num_layers == 1


def test_all_problems_are_listed_and_short():
    values = {
        "image_size": "x" * 1000,
        "vision_encoder": {"num_layers": [3] * 1000, "y" * 1000: 1},
        "text_decoder": None,
    }
    with pytest.raises(ValueError) as raised:
        BackboneConfig.from_dict(values)
    message = str(raised.value)
    assert message.count(";") == 3 and len(message) < 800
    assert "vision_encoder.num_layers must be" in message


def test_numbers_of_numpy_are_written_as_numbers():
    ranks, alphas = np.array([2, 4]), np.array([2.0, 8.0], "float32")
    backbone = BackboneConfig(
        np.int64(28),
        text_decoder=TextDecoderConfig(
            num_layers=np.int64(3), rope_base=np.float32(3)
        ),
        lora=LoraConfig(
            np.int64(4),
            np.float32(2),
            ("query",),
            ranks={"query": list(ranks)},
            alphas={"query": tuple(alphas)},
        ),
    )
    found = json.loads(json.dumps(backbone.to_dict() | {"lora": None}))
    assert found["image_size"] == 28
    assert found["text_decoder"]["num_layers"] == 3
    assert found["text_decoder"]["rope_base"] == 3
    lora = json.loads(json.dumps(backbone.lora.to_dict()))
    assert (lora["rank"], lora["alpha"]) == (4, 2)
    assert lora["ranks"] == {"query": [2, 4]}
    assert lora["alphas"] == {"query": [2, 8]}


def test_fields_by_the_names_of_their_source():
    names = {"num_layers": "depth", "num_heads": "heads"}
    values = {"num_layers": 0, "num_heads": 2}
    (problem,) = VisionEncoderConfig.problems(values, names)
    assert problem.startswith("depth must be an integer")


def test_fields_that_one_tower_has():
    changed = BackboneConfig().with_fields(num_heads=4, rope_base=5.0)
    assert changed.vision_encoder == VisionEncoderConfig(num_heads=4)
    assert changed.text_decoder == TextDecoderConfig(rope_base=5.0)
    with pytest.raises(ValueError, match="'hidden_dim'.*'rope_base'"):
        BackboneConfig().with_fields(hidden_dim=4)
    with pytest.raises(ValueError, match="rope_base must be"):
        BackboneConfig().with_fields(rope_base="x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: Expecting"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"1" * 5000, "cannot be read as JSON"),
        (b" " * 10_000_001, "10,000,001 bytes, expected at most"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_json(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


def test_a_file_of_the_largest_size_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[7]")
    assert read_json(path, limit=3) == [7]
    with pytest.raises(ValueError, match="3 bytes, expected at most 2"):
        read_json(path, limit=2)


def test_the_rules_to_resize_are_those_that_exist():
    from keras_paligemma.preprocessing.resize import RULES
    from keras_paligemma.quantization import storage

    assert set(configs.RESIZES) == set(RULES)
    for quantization in configs.QUANTIZATIONS:
        storage.QuantizedFormat(quantization, (256, 8), (0,))
