"""Conversion without a model, which gives what a model would export."""

import pytest

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
