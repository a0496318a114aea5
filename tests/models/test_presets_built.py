"""Every published preset is built without values and has exact shapes."""

import dataclasses
import json
import math

import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import presets
from keras_paligemma import without_values
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.hugging_face import weights as hugging_face
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.models.inspection import inspect
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import PRESETS

OFFICIAL = json.loads((GOLDEN / "official_shapes.json").read_text())
PUBLISHED = [
    name for name in presets.names() if "handles" in presets.describe(name)
]


def official_size(name):
    """Return the preset's key in the goldens, or `None` for PaliGemma 1."""
    if name.startswith("pali_gemma_3b"):
        return None
    size = next(size for size in ("3b", "10b", "28b") if f"_{size}_" in name)
    return f"{size}_{name.rsplit('_', 1)[1]}"


@pytest.mark.any_backend
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_count_and_shapes(name, form):
    config = presets.describe(name)
    with without_values():
        backbone = PaliGemmaBackbone(**config["backbone"], form=form)
    assert all(variable._value is None for variable in backbone.variables)
    weights = backbone.weights_by_name()
    assert engine.count(weights) == config["parameters"]
    assert backbone.count_params() == config["parameters"]
    text = backbone.text_config
    rows = big_vision.rows(text.use_post_norms)
    shapes = engine.shapes(weights, rows)
    # Weights and the file's arrays correspond one to one.
    assert {row.name for row in rows} == set(weights)
    assert sum(map(math.prod, shapes.values())) == config["parameters"]
    size = official_size(name)
    if size is not None:
        wanted = OFFICIAL[size]["shapes"]
        assert shapes == {key: tuple(shape) for key, shape in wanted.items()}
        assert OFFICIAL[size]["total"] == config["parameters"]


def test_presets_are_listed():
    listed = PaliGemmaBackbone.presets
    assert set(PUBLISHED) <= set(listed)
    assert listed["pali_gemma2_pt_28b_448"]["handles"]


def test_no_value_is_drawn_after_the_scope():
    """A later scope must not fill variables that Keras has recorded."""
    import keras

    with without_values():
        backbone = PaliGemmaBackbone()
    with keras.StatelessScope():
        pass
    assert all(variable._value is None for variable in backbone.variables)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="pali_gemma2_pt_3b_224"):
        PaliGemmaBackbone.from_preset("paligemma2_pt_3b_224")


@pytest.mark.any_backend
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    "name", ["pali_gemma2_pt_28b_448", "pali_gemma_3b_224"]
)
def test_every_format_has_a_place_for_all(name, form):
    """Check names and shapes of each format, both ways, without values."""
    known = presets.describe(name)
    with without_values():
        backbone = PaliGemmaBackbone(**known["backbone"], form=form)
    weights = backbone.weights_by_name()
    config = backbone.architecture()
    padded = hugging_face.rows(config)
    bare = [dataclasses.replace(row, extra=0) for row in padded]
    post_norms = config.text_decoder.use_post_norms
    tables = {
        "keras": ([engine.Row(name, name) for name in weights], 0),
        "big_vision": (big_vision.rows(post_norms), 0),
        "transformers, bare": (bare, 0),
        "transformers, published": (padded, 64),
        "keras_hub": (keras_hub.rows(config), 0),
    }
    width = known["backbone"]["text_decoder"]["hidden_dim"]
    for rows, extra in tables.values():
        shapes = engine.shapes(weights, rows)
        assert sum(map(math.prod, shapes.values())) == (
            known["parameters"] + extra * width
        )
        assert engine.problems(weights, rows, shapes) == []
        assert len({row.name for row in rows}) == len(weights)
    if "28b" in name:
        key = "language_model.model.layers.45.self_attn.q_proj.weight"
        assert engine.shapes(weights, padded)[key] == (32 * 128, 4608)
    # transformers' published arrays are recognised as such.
    found = engine.shapes(weights, padded)
    rows = hugging_face.rows(config, found)
    assert engine.problems(weights, rows, found) == []


def test_a_path_is_inspected_as_its_name():
    name = "pali_gemma2_nano_112"
    found = inspect(PRESETS / name)
    assert found == inspect(name) and found.problems == ()
