"""transformers folders: every layout of names, read and written."""

import json
import math
import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma import presets
from keras_paligemma import without_values
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.hugging_face.config import from_transformers
from keras_paligemma.checkpoints.hugging_face.config import to_transformers
from keras_paligemma.checkpoints.hugging_face.tokenizer import tokenizer_files
from keras_paligemma.checkpoints.storage.safetensors import find
from keras_paligemma.checkpoints.storage.safetensors import open_safetensors
from keras_paligemma.checkpoints.storage.safetensors import write_safetensors
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig
from keras_paligemma.lora_config import LoraConfig
from tests.helpers.text_models import TOKENIZER
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import assert_same_weights
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import run
from tests.helpers.tiny_models import transformers_inputs
from tests.helpers.transformers_folders import SECOND
from tests.helpers.transformers_folders import export
from tests.helpers.transformers_folders import load_theirs
from tests.helpers.transformers_folders import random_backbone

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
reference = pytest.importorskip("tests.helpers.transformers_reference")

SIZE = 101  # The tiny models' vocabulary size.
PUBLISHED = [
    name for name in presets.names() if "handles" in presets.describe(name)
]

# Map names of an in-memory model of transformers 5 to names in the files of
# earlier versions. Files saved by transformers 5 itself are covered by another
# test.
HUB = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
}
LAYOUTS = {
    "hub": HUB | {"lm_head.": None},
    "hub with head": HUB | {"lm_head.": "language_model.lm_head."},
    "4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
}


def read(folder):
    """Read a transformers folder as a loader does."""
    config = hugging_face.read_config(folder).config.backbone
    with without_values():
        backbone = PaliGemmaBackbone(**config.to_dict())
    with open_safetensors(find(folder)) as tensors:
        tensors = hugging_face.tied(tensors)
        rows = hugging_face.rows(config, tensors.shapes)
        engine.load(backbone.weights_by_name(), rows, tensors)
    return backbone


def write_layout(folder, saved, model, layout, extra, max_shard_size=10**9):
    """Write what an earlier version would have saved."""
    arrays = {}
    for key, value in model.state_dict().items():
        for old, new in LAYOUTS[layout].items():
            if key.startswith(old):
                key = new and new + key.removeprefix(old)
                break
        if key is not None:
            arrays[key] = value.numpy()
    if extra:
        # As in published files, random rows follow those of the tokens.
        more = np.random.default_rng(3).normal(size=(extra, 48))
        for key in arrays:
            if key.endswith(("embed_tokens.weight", "lm_head.weight")):
                arrays[key] = np.concatenate(
                    [arrays[key], more.astype("float32")]
                )
    folder.mkdir()
    write_safetensors(folder, arrays.items(), max_shard_size)
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["vocab_size"] = SIZE + extra
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=[1, 2], ids=["first", "second"])
def tiny(request, tmp_path_factory):
    """Return a transformers model, its saved folder, inputs and logits.

    The second model's query scale differs from its head size, as in 28b.
    """
    model = reference.tiny_transformers_model(seed=4, version=request.param)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    inputs, valid = transformers_inputs()
    return model, folder, inputs, reference.run(model, **inputs)[valid]


def logits_of(backbone, inputs):
    _, valid = transformers_inputs()
    logits = run(lambda x: backbone.logits(backbone(x)), inputs)
    return keras.ops.convert_to_numpy(logits)[valid]


def test_what_transformers_saves_now(tiny):
    _, folder, inputs, wanted = tiny
    keys = load_file(folder / "model.safetensors").keys()
    # The fourth layout lacks one level of the others' names.
    assert "vision_tower.post_layernorm.weight" in keys
    assert "language_model.model.norm.weight" in keys
    assert not any("lm_head" in key for key in keys)
    assert error(logits_of(read(folder), inputs), wanted) < 1e-5


@pytest.mark.parametrize("size", [10**9, 10_000], ids=["one", "shards"])
@pytest.mark.parametrize("extra", [0, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_earlier_versions(tiny, tmp_path, layout, extra, size):
    model, saved, inputs, wanted = tiny
    folder = tmp_path / "model"
    write_layout(folder, saved, model, layout, extra, size)
    assert (len(find(folder)) > 3) == (size == 10_000)
    backbone = read(folder)
    assert backbone.text_config.vocabulary_size == SIZE
    assert_same_weights(backbone, read(saved))
    if extra:  # One compilation of these weights is enough.
        assert error(logits_of(backbone, inputs), wanted) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_are_those_of_transformers(tiny, tmp_path, layout):
    """Check that the layouts tested above are those of transformers."""
    model, saved, inputs, wanted = tiny
    _, valid = transformers_inputs()
    write_layout(tmp_path / "model", saved, model, layout, 64)
    loaded = load_theirs(tmp_path / "model")
    logits = reference.run(loaded, **inputs)[valid][:, :SIZE]
    assert error(logits, wanted) < 1e-6


@pytest.mark.parametrize("size", [10**9, 10_000], ids=["one", "shards"])
def test_what_we_write_is_read_by_transformers(tiny, tmp_path, size):
    model, saved, inputs, wanted = tiny
    _, valid = transformers_inputs()
    export(tmp_path / "model", read(saved), max_shard_size=size)
    loaded = load_theirs(tmp_path / "model")
    assert loaded.dtype == torch.float32
    # Every weight keeps its value.
    theirs, before = loaded.state_dict(), model.state_dict()
    assert set(theirs) == set(before)
    for key, value in before.items():
        found = theirs[key]
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert found.shape == (SIZE + 64, 48)
            np.testing.assert_allclose(
                found[SIZE:], value.mean(0).expand(64, -1), atol=1e-6
            )
            found = found[:SIZE]
        assert torch.equal(found, value), key
    logits = reference.run(loaded, **inputs)[valid]
    assert error(logits[:, :SIZE], wanted) < 1e-6
    # Greedy decoding cannot choose a row without a token.
    assert (logits[:, SIZE:].max(1) < logits[:, :SIZE].max(1)).all()
    # We read what we wrote.
    assert error(logits_of(read(tmp_path / "model"), inputs), wanted) < 1e-5


def test_processor_and_generated_tokens_are_ours(tmp_path):
    tokenizer = PaliGemmaTokenizer(TOKENIZER.read_bytes())
    backbone = random_backbone()
    export(tmp_path / "model", backbone, tokenizer.proto)
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer,
        PaliGemmaImageConverter(28, resize="bicubic"),
        prompt_length=20,
        response_length=8,
    )
    random = np.random.default_rng(1)
    shapes = [(28, 28, 3), (61, 40, 3), (9, 35, 3)]
    images = [random.integers(0, 256, s).astype("uint8") for s in shapes]
    prompts = ["caption en", "detect cat ; dog", "Größe <loc0010><seg127>  ?"]
    ours = preprocessor.generate_preprocess(
        {"images": images, "prompts": prompts}
    )

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    assert isinstance(processor, transformers.PaliGemmaProcessor)
    assert processor.image_token_id == 2048
    assert len(processor.tokenizer) == 2049
    theirs = processor(
        text=[f"<image>{prompt}" for prompt in prompts],
        images=[[image] for image in images],
        padding=True,
        return_tensors="pt",
    )
    del theirs["labels"]
    for i in range(3):
        row = theirs["input_ids"][i][theirs["attention_mask"][i] > 0].tolist()
        assert row[:16] == [2048] * 16
        text = ours["token_ids"][i][ours["padding_mask"][i]].tolist()
        assert row[16:] == text
    pixels = theirs["pixel_values"].numpy().transpose(0, 2, 3, 1)
    # We compute in float32 in another order.
    np.testing.assert_allclose(pixels, ours["images"], rtol=0, atol=1e-6)

    model = PaliGemmaCausalLM(backbone, preprocessor)
    answers = model.generate(
        {"images": images, "prompts": prompts}, max_new_tokens=8
    )
    loaded = load_theirs(tmp_path / "model")
    length = theirs["input_ids"].shape[1]
    ids = loaded.generate(**theirs, max_new_tokens=8, do_sample=False)
    new = ids[:, length:].tolist()
    # Otherwise, equal tokens would prove little.
    assert len({tuple(row) for row in new}) == 3
    assert len({token for row in new for token in row}) > 6
    alone = PaliGemmaCausalLM(backbone, None)
    tokens = alone.generate(
        preprocessor.generate_preprocess(
            {"images": images, "prompts": prompts}, max_new_tokens=8
        ),
        max_new_tokens=8,
        stop_token_ids=[1],
    )
    assert keras.ops.convert_to_numpy(tokens).tolist() == new
    texts = processor.batch_decode(ids[:, length:], skip_special_tokens=True)
    assert texts == answers


@pytest.mark.parametrize("file", [TOKENIZER, GOLDEN / "toy_sp.model"])
def test_tokenizers_agree_on_random_texts(tmp_path, file):
    ours = PaliGemmaTokenizer(file.read_bytes())
    size = ours.vocabulary_size()
    for name, content in tokenizer_files(ours.proto, size).items():
        (tmp_path / name).write_bytes(content)
    # Only the class starts with bos, as Gemma's published tokenizer does.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GemmaTokenizer"
    assert theirs("a").input_ids[0] == theirs.bos_token_id == 2
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    assert theirs.convert_tokens_to_ids("<image>") == size
    assert len(theirs) == size + 1
    random = np.random.default_rng(0)
    pieces = [piece.replace("▁", " ") for piece in ours.get_vocabulary()[4:]]
    characters = list("abcaabbnana  \n\n\tGröß東🐈é▁<>0")
    for _ in range(1_000):
        sources = [pieces, characters, characters]
        text = "".join(
            random.choice(sources[random.integers(3)])
            for _ in range(random.integers(12))
        )
        ids = ours.tokenize(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.detokenize(ids), text


def test_bfloat16_is_written_and_read_exactly(tmp_path):
    backbone = random_backbone(dtype="bfloat16")
    export(tmp_path / "model", backbone)
    assert load_theirs(tmp_path / "model").dtype == torch.bfloat16
    found = read(tmp_path / "model")
    assert found.dtype_policy.name == "bfloat16"
    assert_same_weights(found, backbone)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_there_and_back(name):
    backbone = replace(presets.config(name).backbone, dtype="bfloat16")
    config = ModelConfig(
        backbone=backbone, preprocessor=PreprocessorConfig("bicubic")
    )
    files = to_transformers(config, 257_216)
    found = from_transformers(
        files["config.json"], files["preprocessor_config.json"], name
    )
    assert found == config


FIRST = SECOND | {
    "hidden_size": 2048,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "vocab_size": 257216,
}


@pytest.mark.parametrize(
    ("config", "preset", "dtype"),
    [
        (SECOND, "pali_gemma2_pt_3b_224", "bfloat16"),
        (FIRST, "pali_gemma_3b_224", "float32"),
    ],
)
def test_configs_as_published(tmp_path, config, preset, dtype):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = hugging_face.read_config(tmp_path)
    wanted = replace(presets.config(preset).backbone, dtype=dtype)
    assert found.config == ModelConfig(backbone=wanted)
    assert (found.added_tokens, found.num_rows) == ({}, 257_216)
    # transformers reads the same values as its defaults.
    theirs = transformers.PaliGemmaConfig(**config)
    written = to_transformers(found.config, 257_216)["config.json"]
    ours = transformers.PaliGemmaConfig(**written)
    skipped = {
        "vision_config": {"vocab_size"},
        "text_config": {"sliding_window"},
    }
    for section, names in skipped.items():
        said = getattr(theirs, section).to_dict()
        for name, value in getattr(ours, section).to_dict().items():
            if name in said and name not in names | {"dtype"}:
                assert value == said[name], (section, name)


@pytest.mark.parametrize("where", ["preprocessor_config", "processor_config"])
@pytest.mark.parametrize(
    ("resample", "resize"), [(3, "bicubic"), (2, "bilinear_antialias")]
)
def test_the_rule_to_resize_is_read(tmp_path, where, resample, resize):
    (tmp_path / "config.json").write_text(json.dumps(SECOND))
    size = {"height": 224, "width": 224}
    processor = {"resample": resample, "size": size}
    if where == "processor_config":
        processor = {"image_processor": processor}
    (tmp_path / f"{where}.json").write_text(json.dumps(processor))
    found = hugging_face.read_config(tmp_path)
    assert found.config.preprocessor == PreprocessorConfig(resize)


@pytest.mark.parametrize("content", [[1], "x", 3])
def test_a_processor_that_is_no_object(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(SECOND))
    text = json.dumps({"image_processor": content})
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(ValueError, match="no JSON object. Received: "):
        hugging_face.read_config(tmp_path)


@pytest.mark.parametrize(
    ("section", "change", "match"),
    [
        (None, {"model_type": "llava"}, "'llava'"),
        (None, {"torch_dtype": "int8"}, "dtype must be 'float32'"),
        (None, {"text_config": None}, "no text_config"),
        ("text_config", {"model_type": "gemma3"}, "'gemma3'"),
        ("text_config", {"sliding_window": 512}, "window .* received 512"),
        ("text_config", {"hidden_activation": "silu"}, "'silu'"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"head_dim": None}, "head_dim .* received None"),
        ("text_config", {"num_hidden_layers": "3"}, "received '3'"),
        ("text_config", {"num_hidden_layers": 10_000_000}, "of 1 to 512"),
        ("text_config", {"vocab_size": [1]}, r"vocab_size .* received \[1\]"),
        ("text_config", {"query_pre_attn_scalar": "8"}, "received '8'"),
        ("text_config", {"sliding_window": "9"}, "received '9'"),
        ("text_config", {"rope_theta": math.nan}, "rope_theta .* nan"),
        ("vision_config", {"patch_size": False}, "patch_size .* False"),
        (
            "text_config",
            {"rope_parameters": {"rope_type": "yarn"}},
            "'yarn'",
        ),
        ("vision_config", {"num_channels": 4}, "received 4"),
        ("vision_config", {"image_size": [224, 448]}, "image_size"),
    ],
)
def test_configs_that_cannot_be_expressed(tmp_path, section, change, match):
    config = json.loads(json.dumps(SECOND))
    (config if section is None else config[section]).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        hugging_face.read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resample": 0}, "resample"),
        ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean"),
        ({"do_normalize": False}, "do_normalize"),
        ({"size": {"height": 448, "width": 448}}, "size"),
    ],
)
def test_processors_that_cannot_be_expressed(change, match):
    with pytest.raises(ValueError, match=f"image processor.{match}"):
        from_transformers(SECOND, change, "here")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        hugging_face.read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=str(tmp_path)):
        hugging_face.read_config(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["pali_gemma2_pt_28b_224", "pali_gemma2_pt_3b_896", "pali_gemma_3b_448"],
)
def test_names_and_shapes_of_published_models(name):
    """Compare shapes without values, since 28b is 55 GB of them."""
    backbone = presets.config(name).backbone
    files = to_transformers(ModelConfig(backbone=backbone), 257_216)
    config = transformers.PaliGemmaConfig(**files["config.json"])
    with torch.device("meta"):
        model = transformers.PaliGemmaForConditionalGeneration._from_config(
            config
        )
    theirs = {}
    for key, value in model.state_dict().items():
        for old, new in LAYOUTS["hub"].items():
            if key.startswith(old):
                key = new and new + key.removeprefix(old)
                break
        if key is not None:
            theirs[key] = tuple(value.shape)
    with without_values():
        weights = PaliGemmaBackbone(**backbone.to_dict()).weights_by_name()
    ours = engine.shapes(weights, hugging_face.rows(backbone, theirs))
    assert ours == theirs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return what transformers saved of a second model."""
    folder = tmp_path_factory.mktemp("saved")
    reference.tiny_transformers_model(seed=4).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """Return a function that writes the saved model with changed arrays."""

    def write(change):
        folder = tmp_path / "model"
        shutil.copytree(saved, folder)
        arrays = load_file(saved / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")
        return folder

    return write


def test_a_head_of_its_own_is_refused(damaged):
    def change(arrays):
        head = arrays["language_model.model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        arrays["lm_head.weight"] = head

    with pytest.raises(ValueError, match="differs from the embedding"):
        read(damaged(change))


def test_a_head_that_equals_the_table(damaged):
    """The dtypes may differ, and both may contain NaN."""

    def change(arrays):
        table = arrays["language_model.model.embed_tokens.weight"]
        table[3, 5] = np.nan
        arrays["lm_head.weight"] = table.astype("float64")

    table = read(damaged(change)).token_embedding.table
    assert np.isnan(keras.ops.convert_to_numpy(table)[3, 5])


def test_a_head_of_other_shape_is_refused(damaged):
    def change(arrays):
        table = arrays["language_model.model.embed_tokens.weight"]
        arrays["language_model.lm_head.weight"] = table[:-1].copy()

    with pytest.raises(ValueError, match=r"\(100, 48\) differs"):
        read(damaged(change))


def test_a_head_is_compared_in_parts(damaged, monkeypatch):
    monkeypatch.setattr(hugging_face, "COMPARED_ROWS", 7)

    def change(arrays):
        table = arrays["language_model.model.embed_tokens.weight"]
        arrays["lm_head.weight"] = table.copy()

    folder = damaged(change)
    read(folder)
    arrays = load_file(folder / "model.safetensors")
    arrays["lm_head.weight"][-1, -1] += 1
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ValueError, match="differs from the embedding"):
        read(folder)


def test_what_does_not_fit_is_listed(damaged):
    def change(arrays):
        del arrays["vision_tower.post_layernorm.bias"]
        arrays["vision_tower.head.weight"] = np.zeros(3, "float32")
        table = "language_model.model.embed_tokens.weight"
        arrays[table] = np.zeros((SIZE + 65, 48), "float32")

    with pytest.raises(ValueError, match="in 3 places") as error:
        read(damaged(change))
    assert "missing: vision_tower.post_layernorm.bias" in str(error.value)
    assert "unused: vision_tower.head.weight" in str(error.value)
    assert "embed_tokens.weight is (166, 48)" in str(error.value)


def test_other_names_are_refused(damaged):
    def change(arrays):
        for key in list(arrays):
            arrays[f"base_model.model.{key}"] = arrays.pop(key)

    with pytest.raises(ValueError, match="has to be merged"):
        read(damaged(change))


def test_a_folder_in_use_is_left_alone(saved, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in use"):
        export(tmp_path, read(saved))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(saved, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    export(folder, read(saved))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert folder.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_breaks_off_leaves_nothing(saved, tmp_path):
    backbone = read(saved)
    config = ModelConfig(backbone=backbone.architecture())
    rows = hugging_face.rows(config.backbone)
    folder = tmp_path / "model"

    def arrays(last):
        yield from list(engine.write(backbone.weights_by_name(), rows))[:-1]
        assert not folder.exists()  # The draft is a sibling folder.
        assert len(list(tmp_path.iterdir())) == 1
        if last is None:
            raise KeyboardInterrupt
        yield last, np.zeros(3, "float32")

    with pytest.raises(KeyboardInterrupt):
        hugging_face.write(folder, config, arrays(None))
    with pytest.raises(ValueError, match=r"Unknown: \['other'\]") as error:
        hugging_face.write(folder, config, arrays("other"))
    assert "Missing: ['language_model.model.layers.2" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "towers", "match"),
    [
        ({"dtype": "float64"}, {}, "float32, float16"),
        ({"lora": LoraConfig(4)}, {}, "merge them"),
        ({}, {"sliding_window_size": 9}, "sliding_window"),
        ({}, {"query_pre_attention_scalar": 7.5}, "a whole"),
        ({}, {"num_query_heads": 10}, "divides"),
        ({}, {"use_post_norms": False}, "no soft cap"),
    ],
)
def test_models_that_transformers_cannot_express(
    saved, tmp_path, fields, towers, match
):
    config = hugging_face.read_config(saved).config
    backbone = replace(config.backbone.with_fields(**towers), **fields)
    config = replace(config, backbone=backbone)
    with pytest.raises(ValueError, match=match):
        hugging_face.write(tmp_path / "model", config, [])
    assert list(tmp_path.iterdir()) == []


def test_a_rule_to_resize_that_transformers_lacks(saved, tmp_path):
    with pytest.raises(ValueError, match="no way to resize by 'bilinear'"):
        export(tmp_path / "model", read(saved), resize="bilinear")


def edited(change):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(
        TOKENIZER.read_bytes()
    )
    change(model)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.pieces.add(piece="more", type=1), "not 2049"),
        (lambda m: setattr(m.pieces[4], "type", 5), "no unused"),
        (lambda m: setattr(m.pieces[1], "type", 1), "pad, eos, bos"),
        (lambda m: setattr(m.pieces[-1], "piece", "<image>"), "<image>"),
        (lambda m: setattr(m.pieces[-1], "piece", "<x>"), "<seg000>"),
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "BPE"),
        (
            lambda m: setattr(m.normalizer_spec, "add_dummy_prefix", True),
            "no space put",
        ),
        (
            lambda m: setattr(
                m.normalizer_spec, "remove_extra_whitespaces", True
            ),
            "taken away",
        ),
        (
            lambda m: setattr(
                m.normalizer_spec, "precompiled_charsmap", b"abc"
            ),
            "not normalized",
        ),
    ],
)
def test_tokenizers_that_transformers_lacks(change, match):
    with pytest.raises(ValueError, match=match):
        tokenizer_files(edited(change), 2048)


def test_bytes_that_are_no_tokenizer():
    with pytest.raises(ValueError, match="no SentencePiece model"):
        tokenizer_files(b"\xff not a model", 2048)
