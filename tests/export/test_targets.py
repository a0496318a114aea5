"""Every other export target, run by its own runtime alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors import safe_open

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.compat import fill
from keras_paligemma.compat import without_values
from keras_paligemma.export import targets
from tests.helpers.encoded_pictures import ROOT
from tests.helpers.tiny_models import PRESETS
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "jax",
        reason="a format chooses its backend, whichever exports",
    ),
]

NANO = PRESETS / "pali_gemma2_nano_112"
PICTURES = [ROOT / "examples" / "pictures" / f"scene_{n}.png" for n in range(3)]
# Smaller than a text, so that the two layers have different masks.
WINDOW = {"sliding_window_size": 6}
PROMPTS = ["caption en", "answer en how many snail?", "detect apple"]


@pytest.fixture(scope="module")
def model():
    """Return a model with few layers, which converters process quickly."""
    with without_values():
        backbone = PaliGemmaBackbone(
            28,
            VISION | {"num_layers": 1},
            TEXT | {"num_layers": 2, "vocabulary_size": 2048, **WINDOW},
        )
    random = np.random.default_rng(0)
    for variable in backbone.variables:
        fill(variable, random.normal(0, 0.1, variable.shape))
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer((NANO / "tokenizer.model").read_bytes()),
        PaliGemmaImageConverter(28),
        prompt_length=24,
        response_length=6,
    )
    return PaliGemmaCausalLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def asked(model, tmp_path_factory):
    """Return a file of batches with and without answers, and our results."""
    batch = {"images": PICTURES, "prompts": PROMPTS}
    begun = {"responses": ["a lion", "2", "<loc0012> apple"]}
    scored, targets, _ = model.preprocessor(batch | begun)
    # Another batch size.
    batch = {name: value[:2] for name, value in batch.items()}
    arrays = {f"scored/{name}": value for name, value in scored.items()}
    for name, value in model.preprocessor.generate_preprocess(batch).items():
        arrays[f"asked/{name}"] = value
    path = tmp_path_factory.mktemp("asked") / "inputs.npz"
    np.savez(path, **arrays)
    # A token's logits are at the position before it.
    logits = run(lambda x: model(x), scored)[:, -targets.shape[1] - 1 : -1]
    return path, keras.ops.convert_to_numpy(logits), model.generate(batch)


def alone(format, folder, inputs):
    """Run an exported model in a process that has only its runtime."""
    outputs = folder.parent / f"{format}.npz"
    program = Path(__file__).parent / "alone.py"
    subprocess.run(
        [sys.executable, program, format, folder, inputs, outputs], check=True
    )
    with np.load(outputs) as file:
        return dict(file)


def texts_of(model, ids):
    """Convert ids to texts, up to their stop tokens."""
    stop = model.preprocessor.tokenizer.end_token_id
    goes_on = np.cumsum(ids == stop, axis=1) == 0
    ids = np.where(goes_on, ids, 0)
    return model.preprocessor.generate_postprocess({"token_ids": ids})


def stored(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def weights_of(model):
    return sum(variable.value.nbytes for variable in model.backbone.variables)


def test_stablehlo_answers_as_generate(model, asked, tmp_path):
    inputs, logits, texts = asked
    folder = tmp_path / "made"
    model.export(folder, format="stablehlo")
    found = alone("stablehlo", folder, inputs)
    assert error(found["logits"], logits) < 1e-5
    assert texts_of(model, found["ids"]) == texts
    np.testing.assert_array_equal(found["generated"], found["ids"])
    assert stored(folder) - weights_of(model) < 200_000
    # The axes are in the standard order, whichever order this machine uses.
    with safe_open(folder / "model.safetensors", "numpy") as file:
        [name] = [key for key in file.keys() if "projector/kernel" in key]
        kernel = file.get_tensor(name)
    weight = model.backbone.weights_by_name()["vision_encoder/projector/kernel"]
    np.testing.assert_array_equal(kernel, weight.read())


@pytest.fixture(scope="module")
def onnx_folder(model, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx") / "made"
    model.export(folder, format="onnx")
    return folder


def test_onnx_has_the_models_logits(model, asked, onnx_folder):
    pytest.importorskip("onnxruntime")
    inputs, logits, texts = asked
    found = alone("onnx", onnx_folder, inputs)
    assert error(found["logits"], logits) < 1e-5
    assert texts_of(model, found["ids"]) == texts
    assert stored(onnx_folder) - weights_of(model) < 100_000


def test_openvino_has_the_models_logits(model, asked, onnx_folder, tmp_path):
    if importlib.util.find_spec("openvino") is None:  # Import sends telemetry.
        pytest.skip("openvino is not installed")
    from keras_paligemma.export import onnx_files

    inputs, logits, texts = asked
    folder = tmp_path / "made"
    folder.mkdir()
    onnx_files.convert_to_openvino(onnx_folder / "model.onnx", folder)
    found = alone("openvino", folder, inputs)
    assert error(found["logits"], logits) < 1e-5
    assert texts_of(model, found["ids"]) == texts


def test_litert_has_the_models_logits(model, asked, tmp_path):
    pytest.importorskip("ai_edge_litert")
    inputs, logits, texts = asked
    folder = tmp_path / "made"
    model.export(folder, format="litert")
    found = alone("litert", folder, inputs)
    assert error(found["logits"], logits) < 1e-5
    assert texts_of(model, found["ids"]) == texts
    found = alone("litert_int8", folder, inputs)
    assert 1e-5 < error(found["logits"], logits) < 0.1
    whole, small = (
        (folder / name).stat().st_size
        for name in ("model.tflite", "model_int8.tflite")
    )
    assert small < whole / 2


def test_bad_targets_are_refused(model, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="in use"):
        model.export(tmp_path / "used", format="stablehlo")
    with pytest.raises(ValueError, match="'onnx', 'openvino', 'litert'"):
        model.export(tmp_path / "made", format="tensorrt")
    bare = PaliGemmaCausalLM(model.backbone, compile=False)
    with pytest.raises(ValueError, match="preprocessor"):
        bare.export(tmp_path / "made", format="stablehlo")
    for format, kind in (("onnx", "bfloat16"), ("openvino", "int8")):
        name = "dtype" if kind == "bfloat16" else "quantize"
        other = PaliGemmaCausalLM.from_preset(NANO, **{name: kind})
        with pytest.raises(ValueError, match=f"{format}' has no {kind}"):
            other.export(tmp_path / "made", format=format)
    scanned = PaliGemmaCausalLM.from_preset(NANO, form="scanned")
    with pytest.raises(ValueError, match="form='unrolled'"):
        targets.write(scanned, tmp_path / "made", "litert")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"keras_paligemma\[targets\]"):
        model.export(tmp_path / "made", format="onnx")
    assert not (tmp_path / "made").exists()
