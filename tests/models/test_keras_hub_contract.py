"""KerasHub notebooks run with one changed import.

The cases are those that KerasHub's own tests of PaliGemma cover, and common
usage.
"""

import inspect
import json
import re

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.helpers.text_models import TEXT_2048
from tests.helpers.text_models import build_tiny_model
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import PRESETS
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import run

PAIRS = [
    (keras_hub.models.PaliGemmaBackbone, PaliGemmaBackbone),
    (keras_hub.models.PaliGemmaCausalLM, PaliGemmaCausalLM),
    (
        keras_hub.models.PaliGemmaCausalLMPreprocessor,
        PaliGemmaCausalLMPreprocessor,
    ),
    (keras_hub.layers.PaliGemmaImageConverter, PaliGemmaImageConverter),
    (keras_hub.models.PaliGemmaTokenizer, PaliGemmaTokenizer),
]
# Methods that differ on purpose; docs/migrating_from_keras_hub.md explains why.
# `max_length` includes the prompt, which has its own length here.
DIFFERENT = {
    "PaliGemmaBackbone.__init__",
    "PaliGemmaImageConverter.__init__",
    "PaliGemmaCausalLM.generate",
}


def shared_methods(theirs, ours):
    """Yield names of KerasHub's methods that we have, without Keras's own."""
    classes = [cls for cls in theirs.__mro__ if "keras_hub" in cls.__module__]
    for name in sorted(
        {name for class_name in classes for name in vars(class_name)}
    ):
        public = name == "__init__" or not name.startswith("_")
        if public and inspect.isroutine(getattr(theirs, name, None)):
            if hasattr(ours, name):
                yield name


def positions(cls, name):
    """List a method's positional parameters, without `self`."""
    is_bound = inspect.ismethod(getattr(cls, name))
    parameters = inspect.signature(getattr(cls, name)).parameters.values()
    names = [
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return names if is_bound else names[1:]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_signatures_are_keras_hubs(theirs, ours):
    """KerasHub's parameters have the same positions and names here."""
    names = list(shared_methods(theirs, ours))
    assert {"__init__", "from_preset", "save_to_preset"} <= set(names)
    other = {}
    for name in names:
        wanted, found = positions(theirs, name), positions(ours, name)
        if found[: len(wanted)] != wanted:
            other[f"{ours.__name__}.{name}"] = (found, wanted)
    assert other.keys() == {
        name for name in DIFFERENT if name.startswith(f"{ours.__name__}.")
    }, other


NANO = str(PRESETS / "pali_gemma2_nano_112")


@pytest.mark.parametrize(
    ("base", "ours"),
    [
        (keras_hub.models.Backbone, PaliGemmaBackbone),
        (keras_hub.models.CausalLM, PaliGemmaCausalLM),
        (
            keras_hub.models.CausalLMPreprocessor,
            PaliGemmaCausalLMPreprocessor,
        ),
        (keras_hub.layers.ImageConverter, PaliGemmaImageConverter),
        (keras_hub.models.Tokenizer, PaliGemmaTokenizer),
    ],
)
def test_base_classes_find_ours(base, ours):
    found = base.from_preset(NANO)
    assert type(found) is ours
    wanted = ours.from_preset(NANO)
    # Keras appends numbers to the names of repeated layers.
    configs = [
        re.sub(r"_\d+'", "'", str(cls.get_config())) for cls in (found, wanted)
    ]
    assert configs[0] == configs[1]
    if issubclass(ours, keras.Model):
        for weight, other in zip(found.weights, wanted.weights, strict=True):
            np.testing.assert_array_equal(
                ops.convert_to_numpy(weight), ops.convert_to_numpy(other)
            )


def test_other_folders_are_keras_hubs_own(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        keras_hub.models.CausalLM.from_preset(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Unrecognized format"):
        keras_hub.models.Tokenizer.from_preset(str(tmp_path))


@pytest.mark.parametrize("first", ["backbone", "preprocessor"])
def test_a_backbone_and_a_preprocessor_make_a_preset(first, tmp_path):
    """Both parts may be saved separately and in any order."""
    model = build_tiny_model()
    parts = [model.backbone, model.preprocessor]
    for part in parts if first == "backbone" else parts[::-1]:
        part.save_to_preset(tmp_path)
    read = PaliGemmaCausalLM.from_preset(tmp_path)
    assert read.backbone.architecture() == model.backbone.architecture()
    assert read.preprocessor.get_config() == model.preprocessor.get_config()
    assert read.preprocessor.tokenizer.proto == (
        model.preprocessor.tokenizer.proto
    )


def test_parts_are_saved_and_read_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    preprocessor = build_tiny_model().preprocessor
    for part in (
        preprocessor,
        preprocessor.tokenizer,
        preprocessor.image_converter,
    ):
        folder = f"~/{type(part).__name__}"
        part.save_to_preset(folder)
        assert type(part).from_preset(folder).get_config() == part.get_config()
        with pytest.raises(ValueError, match="of another library"):
            path = tmp_path / "home" / folder[2:]
            for file in path.glob("*.json"):
                file.write_text("{}")
            part.save_to_preset(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_files_are_of_the_size_that_is_asked_for(tmp_path):
    model = build_tiny_model()
    model.save_to_preset(tmp_path / "one", max_shard_size=None)
    model.save_to_preset(tmp_path / "many", max_shard_size=np.float32(2**-11))
    model.save_to_preset(tmp_path / "large", max_shard_size=np.int8(100))
    model.backbone.save_to_preset(tmp_path / "backbone", 2**-11)
    for folder in ("one", "large"):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) == 1
    for folder in ("many", "backbone"):
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert len(files) > 1
        assert all(file.stat().st_size < 1.1 * 2**19 for file in files)
    for size in (0, -1, 1e-10, float("nan"), float("inf"), "10KB"):
        with pytest.raises(ValueError, match="positive number of GiB"):
            model.save_to_preset(tmp_path / "none", max_shard_size=size)


def test_names_of_sizes():
    backbone = build_tiny_model(form="unrolled").backbone
    for name in (
        "vocabulary_size",
        "num_layers",
        "hidden_dim",
        "intermediate_dim",
        "num_query_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert getattr(backbone, name) == TEXT_2048[name]
        with pytest.raises(AttributeError):
            setattr(backbone, name, 1)
    patches = IMAGE_SIZE // VISION["patch_size"]
    assert backbone.image_sequence_length == patches**2
    assert backbone.vit_encoder is backbone.vision_encoder
    blocks = backbone.transformer_layers
    assert len(blocks) == 2 and blocks[0].name == "block"
    stacked = PaliGemmaBackbone.from_config(
        backbone.get_config() | {"form": "scanned"}
    )
    with pytest.raises(ValueError, match="form='unrolled'"):
        _ = stacked.transformer_layers


def test_either_order_of_preprocessor_and_backbone():
    model = build_tiny_model()
    parts = model.preprocessor, model.backbone
    for again in (
        PaliGemmaCausalLM(*parts),
        PaliGemmaCausalLM(*parts[::-1]),
        PaliGemmaCausalLM(backbone=parts[1], preprocessor=parts[0]),
    ):
        assert (again.preprocessor, again.backbone) == parts
    bare = PaliGemmaCausalLM(model.backbone)
    assert bare.preprocessor is None
    with pytest.raises(ValueError, match="needs a `PaliGemmaBackbone`"):
        PaliGemmaCausalLM(model.preprocessor)


def test_token_embedding_reversed_is_the_head(golden_backbone, expected):
    backbone = golden_backbone()
    hidden = np.random.default_rng(0).normal(size=(2, 3, 64)) * 9
    hidden = hidden.astype("float32")
    found = backbone.token_embedding(hidden, reverse=True)
    found, wanted = map(ops.convert_to_numpy, (found, backbone.logits(hidden)))
    np.testing.assert_array_equal(found, wanted)
    # Capped and in float32.
    assert 20 < np.abs(found).max() <= 30


def test_without_a_response_mask_nothing_is_response(golden_backbone):
    backbone = golden_backbone()
    inputs = {
        "token_ids": np.array([[2, 7, 9, 11]]),
        "padding_mask": np.ones((1, 4), bool),
    }
    no_response = {"response_mask": np.zeros((1, 4), bool)}
    found, wanted = (
        ops.convert_to_numpy(run(backbone, cls))
        for cls in (inputs, inputs | no_response)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "policy", ["float32", "mixed_float16", "mixed_bfloat16", "bfloat16"]
)
def test_shapes_are_inferred(policy):
    """Some dimensions are unknown, and some inputs lack pictures."""
    backbone = PaliGemmaBackbone(
        IMAGE_SIZE,
        VISION | {"num_layers": 1},
        TEXT | {"num_layers": 1},
        dtype=policy,
    )
    model = PaliGemmaCausalLM(backbone, compile=False)
    names = ("token_ids", "padding_mask", "response_mask")
    for shape in ((2, 5), (None, 5), (None, None)):
        text = {name: keras.KerasTensor(shape, "int32") for name in names}
        for pictures, tokens in (
            ({}, 0),
            ({"images": None}, 0),
            ({"images": keras.KerasTensor((shape[0], 42, 42, 3))}, 9),
            ({"images": keras.KerasTensor((shape[0], 2, 42, 42, 3))}, 18),
            ({"images": keras.KerasTensor((shape[0], None, 42, 42, 3))}, None),
            ({"image_embeddings": keras.KerasTensor((shape[0], 7, 64))}, 7),
        ):
            length = None
            if None not in (shape[1], tokens):
                length = shape[1] + tokens
            spec = backbone.compute_output_spec(text | pictures)
            assert spec.shape == (shape[0], length, 64)
            spec = model.compute_output_spec(text | pictures)
            assert spec.shape == (*shape, TEXT["vocabulary_size"])
            assert spec.dtype == "float32"
    arrays = {name: np.ones((2, 5), "int32") for name in names}
    arrays["images"] = np.zeros((2, 42, 42, 3), "float32")
    spec = backbone.compute_output_spec(arrays)
    assert spec.shape == (2, 14, 64)
    assert spec.dtype == backbone.compute_dtype
    assert backbone.compute_output_shape(
        {"token_ids": (None, None), "images": None}
    ) == (None, None, 64)


def test_targets_are_the_second_argument_of_enable_lora(capsys):
    model = build_tiny_model()
    model.backbone.enable_lora(2, ["query", "value"])
    assert model.backbone.lora["targets"] == ["query", "value"]
    model = build_tiny_model()
    model.enable_lora(2, target_layer_names="decoder.mlp", alpha=4)
    assert model.backbone.lora["targets"] == ["gate", "up", "down"]
    assert model.backbone.lora["alpha"] == 4
    with pytest.raises(ValueError, match="are the same"):
        model.backbone.enable_lora(2, ["query"], targets=["query"], name="b")


def adapter(backbone):
    return {
        name: weight.read()
        for name, weight in backbone.weights_by_name().items()
        if "/adapter_" in name
    }


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_lora_weights_in_one_file(form, tmp_path):
    path = tmp_path / "a.lora.h5"
    backbone = build_tiny_model(form=form).backbone
    with pytest.raises(ValueError, match="no adapter to save"):
        backbone.save_lora_weights(path)
    backbone.enable_lora(2, ["query", "vision.up"], alpha=3)
    for variable in backbone.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    backbone.save_lora_weights(str(path))
    wanted = adapter(backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lora.h5"]
    # Load into a model without adapters, and into one with the same adapters.
    bare, same = (build_tiny_model().backbone for _ in range(2))
    same.enable_lora(2, ["query", "vision.up"], alpha=3, dropout=0.5)
    for read in (bare, same):
        read.load_lora_weights(path)
        found = adapter(read)
        assert found.keys() == wanted.keys() and len(found) == 6
        for name, value in found.items():
            np.testing.assert_array_equal(value, wanted[name], name)


def test_lora_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "a.lora.h5"
    backbone = build_tiny_model().backbone
    backbone.enable_lora(2)
    backbone.save_lora_weights(path)
    other = build_tiny_model().backbone
    other.enable_lora(3)
    before = adapter(other)
    with pytest.raises(ValueError, match="another adapter.*rank=2.*rank=3"):
        other.load_lora_weights(path)
    for name, value in adapter(other).items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ValueError, match=r"must end in .lora.h5"):
        backbone.save_lora_weights(tmp_path / "a.h5")
    with h5py.File(tmp_path / "hub.lora.h5", "w") as file:
        file.create_group("lora")
    (tmp_path / "torn.lora.h5").write_bytes(path.read_bytes()[:1000])
    # In a model of another width, nothing is filled up with zeros.
    wide = PaliGemmaBackbone(
        IMAGE_SIZE,
        VISION | {"num_layers": 4},
        TEXT | {"vocabulary_size": 2048, "hidden_dim": 72},
    )
    with pytest.raises(ValueError, match="make up no kernel"):
        wide.load_lora_weights(path)
    assert wide.lora is None
    for name, message in (
        ("hub", "KerasHub numbers the layers"),
        ("torn", "cannot be read as an adapter"),
        ("none", "cannot be read as an adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone.load_lora_weights(tmp_path / f"{name}.lora.h5")


def test_long_lists_are_answered_in_batches(golden_backbone, expected):
    from tests.helpers.tiny_models import golden_prompts

    model = PaliGemmaCausalLM(golden_backbone())
    inputs = golden_prompts(expected)
    inputs = {key: value[:3] for key, value in inputs.items()}
    answers = model.generate(inputs, stop_token_ids=None, batch_size=2)
    np.testing.assert_array_equal(answers, expected["f32/cache_f32/tokens"][:3])
    with pytest.raises(ValueError, match="integer of at least 1. Received: 0"):
        model.generate(inputs, batch_size=0)


def test_texts_in_batches(examples):
    model = build_tiny_model()
    asked = []

    def function(program, plan, rows, shared):
        asked.append(len(rows["prompt_ids"]))
        shown = rows["prompt_ids"][:, -2:-1] % 1024
        none = np.zeros(shown.shape, "float32")
        return {"ids": shown, "log_probabilities": none, "sampler": []}

    model.generate_function = function
    inputs = {key: examples[key] for key in ("images", "prompts")}
    wanted = model.generate(inputs)
    assert len(set(wanted)) > 1
    for size, sizes in ((3, [3, 3]), (4, [4]), (9, [4])):
        asked.clear()
        assert model.generate(inputs, batch_size=size) == wanted
        assert asked == sizes
    one = {key: value[1] for key, value in inputs.items()}
    assert model.generate(one, batch_size=2) == wanted[1]


def test_pictures_are_converted_in_one_way():
    for name, value in (("crop_to_aspect_ratio", True), ("scale", 1 / 255)):
        with pytest.raises(ValueError, match=f"'{name}'.*stay relative"):
            PaliGemmaImageConverter((28, 28), **{name: value})


def test_metadata_of_presets():
    known = PaliGemmaBackbone.presets["pali_gemma2_pt_3b_224"]["metadata"]
    assert known["params"] == 3032094960
    assert known["description"]
    assert PaliGemmaCausalLM.presets == PaliGemmaBackbone.presets


def test_a_task_is_plain_json(examples):
    model = build_tiny_model()
    config = json.loads(json.dumps(model.get_config()))
    again = PaliGemmaCausalLM.from_config(config)
    assert again.get_config() == model.get_config()
