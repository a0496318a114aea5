"""Conversion without a model, which gives what a model would export."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma.models import conversion
from keras_paligemma.models.exports import export
from tests.helpers.text_models import TEXT_2048
from tests.helpers.text_models import TOKENIZER
from tests.helpers.text_models import build_tiny_model
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import VISION


def convert(source, target, to, **options):
    checkpoint, weights = conversion.find(source)
    conversion.write(checkpoint, weights, target, to, **options)


@pytest.mark.parametrize("to", ["keras", "transformers", "keras_hub"])
def test_a_preprocessor_that_was_saved_beside_is_converted(tmp_path, to):
    source = tmp_path / "source/model"
    model = build_tiny_model()
    converter = PaliGemmaImageConverter(IMAGE_SIZE, "bilinear_antialias")
    model.preprocessor.image_converter = converter
    model.backbone.save_to_preset(source)
    model.preprocessor.save_to_preset(source)
    convert(source, tmp_path / "converted/model", to)
    model = PaliGemmaCausalLM.from_preset(source)
    wanted = tmp_path / "exported/model"
    export(wanted, to, model.backbone, model.preprocessor)
    files = [path for path in wanted.rglob("*") if path.is_file()]
    # Those hold the time.
    files = [path for path in files if path.name != "metadata.json"]
    assert any(path.suffix in (".model", ".spm") for path in files)
    for path in files:
        found = tmp_path / "converted/model" / path.relative_to(wanted)
        assert found.read_bytes() == path.read_bytes(), path


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    """`from_preset` would refuse the files, after hours perhaps."""
    text = TEXT_2048 | {"vocabulary_size": 2050}
    source, target = tmp_path / "source", tmp_path / "target"
    PaliGemmaBackbone(IMAGE_SIZE, VISION, text).save_to_preset(source)
    checkpoint, weights = conversion.find(source, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="2048 pieces, 2 fewer than the 2050"):
        conversion.write(checkpoint, weights, target, "keras")
    assert not target.exists()


def test_float16_is_not_rounded(tmp_path):
    """It is computed in bfloat16, which has three bits less."""
    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT_2048)
    backbone.save_to_preset(tmp_path / "source")
    half, again = tmp_path / "half", tmp_path / "again"
    convert(tmp_path / "source", half, "transformers", dtype="float16")
    convert(half, again, "transformers")
    wanted = load_file(half / "model.safetensors")
    for key, array in load_file(again / "model.safetensors").items():
        assert array.dtype == "float16"
        # Rows beyond the vocabulary are the mean of the others.
        rows = 2048 if "embed_tokens" in key else None
        np.testing.assert_array_equal(array[:rows], wanted[key][:rows], key)
    for folder in (half, again):
        config = json.loads((folder / "config.json").read_text())
        assert config["torch_dtype"] == "float16"
