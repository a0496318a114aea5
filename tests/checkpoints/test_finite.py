"""NaN and infinite weights are found while reading and while casting."""

import json

import ml_dtypes
import numpy as np
import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma.checkpoints import finite
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.engine import Arrays
from keras_paligemma.checkpoints.finite import Finite
from keras_paligemma.checkpoints.finite import all_finite
from keras_paligemma.checkpoints.finite import cast
from keras_paligemma.models import conversion
from keras_paligemma.models import exports
from tests.helpers.tiny_models import NOT_IN_SHAPES

DTYPES = ("float16", "float32", "float64", ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_is_looked_at(dtype, monkeypatch):
    monkeypatch.setattr(finite, "CHUNK", 16)
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(dtype)
    largest = ml_dtypes.finfo(dtype).max
    array[0, :4] = largest, -largest, 0.0, -0.0
    array[1, 0] = ml_dtypes.finfo(dtype).smallest_subnormal
    assert all_finite(array)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for at in np.ndindex(array.shape):
            changed = array.copy()
            changed[at] = value
            assert not all_finite(changed)
            assert not all_finite(changed.T)
            # In a strided view, only the values of the view are checked.
            assert all_finite(changed[:, ::2]) == (at[1] % 2 == 1)


def test_what_has_no_such_values():
    assert all_finite(np.array([-1, 127], "int8"))
    assert all_finite(np.zeros((0, 3), "float32"))
    assert all_finite(np.float32(3).reshape(()))
    assert not all_finite(np.array(np.inf))
    # -128 has no negative in int8.
    packed = {"kernel": np.array([-128, 127], "int8")}
    tensors = Finite(Arrays(packed), "a file", "float16")
    assert tensors.read("kernel") is packed["kernel"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("to", formats.FORMATS)
def test_they_are_refused_unless_asked_for(
    golden_backbone, tmp_path, to, value
):
    backbone = golden_backbone()
    name = "vision_encoder/final_norm/gamma"
    weight = backbone.weights_by_name()[name]
    values = np.ones(weight.shape, "float32")
    values[3:5] = value
    weight.assign(values)
    path = tmp_path / ("x.npz" if to == "big_vision" else "model")
    exports.export(path, to, backbone)
    fields = NOT_IN_SHAPES if to == "big_vision" else {}
    key = formats.find(path, fields).rows_for([name])
    key = next(row.key for row in key if row.name == name)
    with pytest.raises(ValueError, match="2 values of 48 that are") as raised:
        PaliGemmaBackbone.from_preset(path, **fields)
    assert key in str(raised.value) and str(tmp_path) in str(raised.value)
    found = PaliGemmaBackbone.from_preset(path, allow_nonfinite=True, **fields)
    found = found.weights_by_name()[name].read()
    np.testing.assert_array_equal(found, values)


def test_a_cast_makes_no_infinity():
    array = np.array([1e5, -3e5, 65519, np.nan, np.inf], "float32")
    with pytest.raises(ValueError, match="'a'.*2 values.*300000.*65504"):
        cast("a", array, "float16")
    np.testing.assert_array_equal(cast("a", array, "float32"), array)
    # Those of the source are the reader's concern.
    found = cast("a", array[2:], "float16")
    np.testing.assert_array_equal(found, [65504, np.nan, np.inf])
    half = array.astype(ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="3 values.*299008"):
        cast("a", half, "float16")
    largest = np.full((), np.finfo("float32").max)
    with pytest.raises(ValueError, match="1 values.*bfloat16 cannot hold"):
        cast("a", largest, ml_dtypes.bfloat16)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_no_format_is_written_with_values_out_of_range(
    golden_backbone, tmp_path, to
):
    backbone = golden_backbone()
    weight = backbone.weights_by_name()["text_decoder/final_norm/scale"]
    weight.assign(np.full(weight.shape, 1e5, "float32"))
    path = tmp_path / ("x.npz" if to == "big_vision" else "model")
    with pytest.raises(ValueError, match="norm.*float16.*bfloat16"):
        exports.export(path, to, backbone, dtype="float16")
    assert not list(tmp_path.iterdir())
    exports.export(path, to, backbone, dtype="bfloat16")


def test_a_configuration_of_float16_and_values_out_of_its_range(
    golden_backbone, tmp_path
):
    backbone = golden_backbone()
    weight = backbone.weights_by_name()["text_decoder/final_norm/scale"]
    weight.assign(np.full(weight.shape, 1e5, "float32"))
    backbone.save_to_preset(tmp_path / "floats")
    with pytest.raises(ValueError, match="final_norm.*float16.*bfloat16"):
        PaliGemmaBackbone.from_preset(tmp_path / "floats", dtype="float16")
    path = tmp_path / "floats" / "config.json"
    config = json.loads(path.read_text())
    config["backbone"]["dtype"] = "float16"
    path.write_text(json.dumps(config))
    found = conversion.find(tmp_path / "floats")
    with pytest.raises(ValueError, match="norm.weight.*float16"):
        conversion.write(*found, tmp_path / "theirs", "transformers")
    assert not (tmp_path / "theirs").exists()
