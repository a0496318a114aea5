"""Freezing by patterns, and the table of trainable weights."""

import numpy as np
import pytest

from keras_paligemma import PaliGemmaCausalLM
from tests.helpers.tiny_models import arrays_of


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_frozen_by_pattern_stays(tiny_model, examples, form):
    model = tiny_model(form=form)
    model.freeze("vision_encoder/*", "*/token_embedding/*")
    model.unfreeze("vision_encoder/projector/*")
    model.compile("sgd")
    before = arrays_of(model.backbone)
    model.fit(examples, verbose=0)
    for name, value in arrays_of(model.backbone).items():
        frozen = "projector" not in name and (
            name.startswith("vision_encoder/") or "embedding" in name
        )
        if name.endswith("key/bias") and not frozen:
            continue  # It does not change a softmax.
        assert (value == before[name]).all() == frozen, name


def test_pattern_without_a_match_changes_nothing(tiny_model):
    backbone = tiny_model().backbone
    with pytest.raises(ValueError, match="Received: 'vision_tower/"):
        backbone.freeze("text_decoder/*", "vision_tower/*")
    assert all(variable.trainable for variable in backbone.variables)


def test_nothing_to_train_is_refused(tiny_model, examples):
    model = tiny_model()
    model.freeze(["*"])
    model.compile()
    for train in model.fit, model.train_on_batch:
        with pytest.raises(ValueError, match="would train nothing"):
            train(examples)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_scales_of_low_bits_are_not_trained(random_preset, mode):
    model = PaliGemmaCausalLM.from_preset(random_preset, quantize=mode)
    model.enable_lora(2)
    before = {variable.path for variable in model.trainable_variables}
    model.unfreeze("text_decoder/*norm/scale", "text_decoder/*scale")
    added = {
        variable.path.rsplit("/", 1)[1]
        for variable in model.trainable_variables
        if variable.path not in before
    }
    assert added == {"scale"}
    with pytest.raises(ValueError, match="No weight matches"):
        model.unfreeze("*/kernel_scale")


def test_table_counts(tiny_model):
    backbone = tiny_model().backbone
    total = backbone.count_params()
    assert f"{total:,}  of {total:,} (100 %)" in backbone.trainable_table()
    backbone.freeze("*")
    backbone.unfreeze("text_decoder/final_norm/scale")
    table = backbone.trainable_table()
    scale = np.prod(backbone.text_decoder.final_norm.scale.shape)
    assert f"{scale:>11,}  of {total:,}" in table
    assert len(table.splitlines()) == 3
