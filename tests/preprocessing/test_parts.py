"""Saving and loading tokenizer, converter and preprocessor separately."""

import json
import shutil

import numpy as np
import pytest

from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma import presets
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import PRESETS

NANO = PRESETS / "pali_gemma2_nano_112"


@pytest.fixture(scope="module")
def parts():
    """Return one of each class, with settings that differ from the defaults."""
    tokenizer = PaliGemmaTokenizer(GOLDEN / "toy_sp.model", add_eos=True)
    converter = PaliGemmaImageConverter((28, 42), resize="bicubic")
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer,
        converter,
        prompt_length=12,
        response_length=9,
        on_long_prompt="truncate",
    )
    return [tokenizer, converter, preprocessor]


@pytest.mark.parametrize("which", range(3))
def test_a_home_that_nobody_has(parts, which):
    with pytest.raises(ValueError, match="no preset and no folder"):
        type(parts[which]).from_preset("~nobody_of_this_name/a")


@pytest.mark.parametrize("which", range(3))
def test_saved_and_read_by_themselves(parts, which, tmp_path):
    part = parts[which]
    part.save_to_preset(tmp_path)
    read = type(part).from_preset(tmp_path)
    assert read.get_config() == part.get_config()
    # The config is JSON and complete, except for the vocabulary.
    config = json.loads(json.dumps(part.get_config()))
    assert type(part).from_config(config).get_config() == part.get_config()


def test_what_is_read_does_the_same(parts, tmp_path):
    tokenizer, converter, preprocessor = parts
    preprocessor.save_to_preset(str(tmp_path))
    read = PaliGemmaCausalLMPreprocessor.from_preset(str(tmp_path))
    picture = np.random.default_rng(0).integers(0, 256, (20, 31, 3), "uint8")
    example = {
        "images": picture,
        "prompts": "caption en",
        "responses": "a dog",
    }
    for key, value in preprocessor(example)[0].items():
        np.testing.assert_array_equal(read(example)[0][key], value)
    # Each of its parts can be loaded too.
    read = PaliGemmaTokenizer.from_preset(tmp_path, add_eos=False)
    assert read.tokenize("a") == tokenizer.tokenize("a")[:-1]
    read = PaliGemmaImageConverter.from_preset(tmp_path, resize="bilinear")
    assert (read.image_size, read.resize) == ((28, 42), "bilinear")
    changed = PaliGemmaCausalLMPreprocessor.from_preset(
        tmp_path, sequence_length=30, tokenizer=NANO / "tokenizer.model"
    )
    assert (changed.prompt_length, changed.response_length) == (15, 15)
    assert changed.tokenizer.vocabulary_size() == 2048


def test_parts_of_a_whole_preset():
    tokenizer = PaliGemmaTokenizer.from_preset("pali_gemma2_nano_112")
    assert tokenizer.proto == (NANO / "tokenizer.model").read_bytes()
    names = tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token
    assert names == ("<bos>", "<eos>", "<pad>")
    converter = PaliGemmaImageConverter.from_preset(str(NANO))
    assert converter.image_size == (112, 112)
    assert converter.resize == "bilinear_antialias"
    # Known presets need no file.
    converter = PaliGemmaImageConverter.from_preset("pali_gemma2_pt_3b_448")
    assert converter.image_size == (448, 448)
    with pytest.raises(ValueError, match="Did you mean 'pali_gemma2_nano_112'"):
        PaliGemmaTokenizer.from_preset("pali_gemma2_nano")


def test_a_whole_preset_is_no_place_for_a_part(parts, tmp_path):
    shutil.copy(NANO / "config.json", tmp_path)
    for part in parts:
        with pytest.raises(ValueError, match="a preprocessor of its own"):
            part.save_to_preset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_files_of_others_stay(parts, tmp_path):
    """A tokenizer.json of transformers has the same name as ours."""
    for name, text in (
        ("tokenizer.json", '{"version": "1.0"}'),
        ("config.json", '{"model_type": "paligemma"}'),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        for part in parts:
            with pytest.raises(ValueError, match=f"holds {name} of another"):
                part.save_to_preset(folder)
        assert (folder / name).read_text() == text
        assert len(list(folder.iterdir())) == 1
    # A new folder is created, and parts may be saved again.
    for _ in range(2):
        parts[2].save_to_preset(tmp_path / "new" / "folder")


def test_presets_are_described():
    for cls in (
        PaliGemmaTokenizer,
        PaliGemmaImageConverter,
        PaliGemmaCausalLMPreprocessor,
    ):
        assert tuple(cls.presets) == presets.names()
        known = cls.presets["pali_gemma2_pt_28b_224"]["metadata"]
        assert known["params"] == 27650192112
