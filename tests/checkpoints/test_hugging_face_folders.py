"""Folders written by training with transformers: extra and missing files."""

import json
import shutil

import keras
import numpy as np
import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.hugging_face.tokenizer import read_tokenizer
from keras_paligemma.checkpoints.hugging_face.tokenizer import tokenizer_files
from tests.helpers.text_models import TOKENIZER
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import assert_same_weights
from tests.helpers.transformers_folders import SECOND
from tests.helpers.transformers_folders import export
from tests.helpers.transformers_folders import load_theirs
from tests.helpers.transformers_folders import random_backbone

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

PIECES = 2048  # The nano tokenizer's vocabulary size.
PICTURE = np.arange(28 * 28 * 3, dtype="uint8").reshape(28, 28, 3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a small model's transformers folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("folders") / "exported"
    tokenizer = PaliGemmaTokenizer(TOKENIZER.read_bytes())
    export(folder, random_backbone(), tokenizer.proto)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """Return a copy of the exported folder."""
    return shutil.copytree(exported, tmp_path / "model")


# Added tokens


def add_tokens(folder, tokens, rows=None):
    """Add tokens to a folder as a user of transformers does."""
    model = load_theirs(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(rows or len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def test_added_tokens_are_said_as_in_transformers(folder, tmp_path):
    tokens = ["<cat>", "red dog", "Größe9"]
    model, processor = add_tokens(folder, tokens)
    asked = processor(
        text="<image>caption <cat>", images=PICTURE, return_tensors="pt"
    )
    asked.pop("labels", None)
    with torch.no_grad():
        # Set the second token's row so that the answer begins with it.
        states = model(**asked, output_hidden_states=True).hidden_states[-1]
        table = model.get_input_embeddings().weight
        assert table.shape[0] == PIECES + 4
        table[PIECES + 2] = states[0, -1] / states[0, -1].norm()
    model.save_pretrained(folder)
    wanted = model.generate(**asked, max_new_tokens=4, do_sample=False)
    wanted = wanted[0, asked["input_ids"].shape[1] :].tolist()
    assert wanted[0] == PIECES + 2

    ours = PaliGemmaCausalLM.from_preset(folder, response_length=4)
    assert ours.backbone.text_config.vocabulary_size == PIECES + 4
    tokenizer = ours.preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == PIECES + 4
    for text in ("a <cat>", "the red dog <loc0003>", "Größe9 Größe", *tokens):
        theirs = processor.tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.tokenize(text) == theirs, text
        assert max(theirs) > PIECES
        assert tokenizer.detokenize(theirs) == text
    answer = ours.generate({"images": PICTURE, "prompts": "caption <cat>"})
    assert answer.startswith("red dog")
    assert tokenizer.tokenize(answer) == wanted

    # Exported again: transformers reads the same rows and names.
    ours.export_to_transformers(tmp_path / "back")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "back")
    assert again.image_token_id == PIECES + 4
    for text in tokens:
        (id,) = again.tokenizer.encode(text, add_special_tokens=False)
        assert id == tokenizer.tokenize(text)[0]
    ours.save_to_preset(tmp_path / "ours")
    preset = presets.read_folder(tmp_path / "ours").backbone
    assert preset.text_decoder.vocabulary_size == PIECES + 4


def test_a_tokenizer_alone_has_the_added_tokens(folder):
    (folder / "added_tokens.json").write_text(f'{{"<cat>": {PIECES + 1}}}')
    alone = PaliGemmaTokenizer.from_preset(folder, add_bos=True)
    assert alone.tokenize("<cat>") == [2, PIECES + 1]
    preprocessor = PaliGemmaCausalLMPreprocessor.from_preset(folder)
    assert alone.proto == preprocessor.tokenizer.proto


def test_rows_that_nobody_names_are_left_out(folder):
    """Rows are often padded to a multiple, for faster matrix products."""
    add_tokens(folder, ["<cat>"], rows=PIECES + 128)
    found = formats.find(folder).config.backbone.text_decoder
    assert found.vocabulary_size == PIECES + 2
    table = PaliGemmaBackbone.from_preset(folder).token_embedding.table
    assert table.shape[0] == PIECES + 2


def test_many_rows_without_names_are_refused(folder):
    add_tokens(folder, [f"<new{number}>" for number in range(72)])
    assert formats.find(
        folder
    ).config.backbone.text_decoder.vocabulary_size == (PIECES + 73)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="2121 rows, 73 more than"):
        formats.find(folder)


def test_names_without_rows_are_refused(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["vocab_size"] = PIECES + 2
    path.write_text(json.dumps(config))
    names = {"<image>": PIECES, "<a>": PIECES + 1, "<b>": PIECES + 2}
    (folder / "added_tokens.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="2051 tokens, of which 2 were added"):
        formats.find(folder)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", '{"<a>": "2049"}', "adds '<a>' with the id"),
        ("added_tokens.json", '{"<a>": 2048}', "'<image>' and to '<a>'"),
        ("added_tokens.json", '{"<image>": 2050}', "as image_token_index"),
        ("added_tokens.json", "[]", "added_tokens.json does not list"),
        ("tokenizer.json", "{}", "tokenizer.json does not list"),
        (
            "tokenizer.json",
            '{"added_tokens": ' + "[" * 100_000,
            "nested too deeply",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 3}}',
            "tokenizer_config.json does not list",
        ),
    ],
)
def test_damaged_names_are_told(folder, name, content, match):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=match):
        formats.find(folder)


def test_a_tokenizer_of_other_size_is_refused(folder):
    model = PaliGemmaCausalLM.from_preset(folder)
    model.save_to_preset(folder.parent / "ours")
    toy = folder.parent / "toy.model"
    proto = TOKENIZER.read_bytes()
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece_model_pb2.ModelProto.FromString(proto)
    pieces.pieces.add(piece="<more>", score=0.0, type=4)
    toy.write_bytes(pieces.SerializeToString())
    with pytest.raises(ValueError, match="2049 pieces, 1 more than the 2048"):
        PaliGemmaCausalLM.from_preset(folder.parent / "ours", tokenizer=toy)


# A lone tokenizer.json, which is what transformers 5 saves


@pytest.mark.parametrize("file", [TOKENIZER, GOLDEN / "toy_sp.model"])
def test_a_tokenizer_json_gives_the_same_ids(tmp_path, file):
    wanted = PaliGemmaTokenizer(file.read_bytes())
    size = wanted.vocabulary_size()
    for name, content in tokenizer_files(wanted.proto, size).items():
        (tmp_path / name).write_bytes(content)
    # The same after transformers saves it again.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    random = np.random.default_rng(0)
    pieces = [piece.replace("▁", " ") for piece in wanted.get_vocabulary()[4:]]
    characters = list("abcaabbnana  \n\n\tGröß東🐈é▁<>0")
    texts = [
        "".join(
            random.choice([pieces, characters][random.integers(2)])
            for _ in range(random.integers(12))
        )
        for _ in range(500)
    ]
    ids = wanted.tokenize(texts)
    for folder in (tmp_path, tmp_path / "again"):
        found = PaliGemmaTokenizer(read_tokenizer(folder / "tokenizer.json"))
        assert found.get_vocabulary() == wanted.get_vocabulary()
        assert found.tokenize(texts) == ids
        assert found.detokenize(ids) == wanted.detokenize(ids)


def test_a_model_with_a_tokenizer_json_alone(folder):
    processor = add_tokens(folder, ["<cat>"])[1]
    (folder / "tokenizer.model").unlink()
    model = PaliGemmaCausalLM.from_preset(folder)
    text = "the <cat> in\nthe corner <loc0007>"
    assert model.preprocessor.tokenizer.tokenize(
        text
    ) == processor.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "no tokenizer of Gemma"),
        ('{"model": {"type": "Unigram"}, "normalizer": null}', "expected BPE"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_another_tokenizer_json_is_refused(tmp_path, content, match):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        read_tokenizer(tmp_path / "tokenizer.json")


# Files that Trainer does not save


def test_a_folder_without_a_processor_is_completed(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="Taken: resize='bicubic'") as warned:
        model = PaliGemmaCausalLM.from_preset(folder)
    assert len(warned) == 1
    assert str(folder) in str(warned[0].message)
    assert warned[0].filename == __file__
    assert model.preprocessor.image_converter.resize == "bicubic"
    assert model.preprocessor.prompt_length == 64
    with pytest.warns(UserWarning, match="Pass `resize=`"):
        PaliGemmaCausalLMPreprocessor.from_preset(folder)
    # There is no warning when the resize method is given.
    chosen = PaliGemmaCausalLM.from_preset(folder, resize="bilinear")
    assert chosen.preprocessor.image_converter.resize == "bilinear"


def test_its_tokenizer_may_come_from_elsewhere(folder):
    for name in (
        "preprocessor_config.json",
        "tokenizer.model",
        "tokenizer.json",
    ):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="tokenizer='paligemma_tokenizer"):
        with pytest.warns(UserWarning, match="Taken"):
            PaliGemmaCausalLM.from_preset(folder)
    with pytest.warns(UserWarning, match="Taken: resize='bicubic'"):
        model = PaliGemmaCausalLM.from_preset(folder, tokenizer=TOKENIZER)
    assert model.preprocessor.tokenizer.vocabulary_size() == PIECES
    assert (
        PaliGemmaCausalLM.from_preset(folder, preprocessor=None).preprocessor
        is None
    )


def test_lengths_are_those_of_the_published_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SECOND))
    found = formats.find(tmp_path, load_weights=False)
    known = presets.config("pali_gemma2_pt_3b_224").preprocessor
    assert found.variant == "pali_gemma2_pt_3b_224"
    assert found.config.preprocessor.prompt_length == known.prompt_length
    assert found.config.preprocessor.resize == "bicubic"


# Weights


def test_a_table_that_is_stored_as_the_head(folder):
    """accelerate and lerobot's `save_model` stores tied weights once."""
    from safetensors.torch import save_model

    wanted = PaliGemmaBackbone.from_preset(folder)
    save_model(load_theirs(folder), folder / "model.safetensors")
    with formats.find(folder).open_files() as tensors:
        assert not any("lm_head" in key for key in tensors.shapes)
    assert_same_weights(PaliGemmaBackbone.from_preset(folder), wanted)


def test_float16_is_computed_in_bfloat16(folder):
    model = load_theirs(folder).half()
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match="float16. Taken: dtype='bfloat16'"):
        backbone = PaliGemmaBackbone.from_preset(folder)
    assert backbone.dtype_policy.name == "bfloat16"
    for dtype in ("float16", "float32"):
        backbone = PaliGemmaBackbone.from_preset(folder, dtype=dtype)
        assert backbone.dtype_policy.name == dtype
        scale = backbone.text_decoder.final_norm.scale
        assert keras.backend.standardize_dtype(scale.dtype) == dtype


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights_name_their_format(folder, method):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantised by '{method}'.*quantize="):
        formats.find(folder)
