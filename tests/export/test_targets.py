"""Every further target, run by its own runtime and nothing else of ours."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from tests.conftest import PRESETS
from tests.conftest import error
from tests.conftest import run
from tests.export.conftest import ROOT

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="a format chooses its backend, whichever exports",
)

NANO = PRESETS / "pali_gemma2_nano_112"
PICTURES = [ROOT / "examples" / "pictures" / f"scene_{n}.png" for n in range(3)]
PROMPTS = ["caption en", "answer en how many snail?", "detect apple"]


@pytest.fixture(scope="module")
def nano():
    return PaliGemmaCausalLM.from_preset(NANO)


@pytest.fixture(scope="module")
def tiny():
    """A model that converters have done with soon: unequal sizes, 2 layers."""
    keras.utils.set_random_seed(0)
    backbone = PaliGemmaBackbone(
        28,
        {
            "patch_size": 14,
            "num_layers": 1,
            "hidden_dim": 48,
            "num_heads": 4,
            "intermediate_dim": 88,
        },
        {
            "vocabulary_size": 2048,
            "num_layers": 2,
            "hidden_dim": 64,
            "intermediate_dim": 112,
            "num_query_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "query_pre_attention_scalar": 24,
        },
    )
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer((NANO / "tokenizer.model").read_bytes()),
        PaliGemmaImageConverter(28),
        prompt_length=24,
        response_length=6,
    )
    return PaliGemmaCausalLM(backbone, preprocessor)


def outputs_of(model, format, folder, tmp_path):
    """Run an exported model elsewhere; give its outputs and the wanted ones."""
    batch = {"images": PICTURES, "prompts": PROMPTS}
    begun = {"responses": ["a lion", "2", "<loc0012> apple"]}
    scored, _, weights = model.preprocessor(batch | begun)
    # Another number of rows.
    batch = {name: value[:2] for name, value in batch.items()}
    asked = model.preprocessor.generate_preprocess(batch)
    arrays = {f"scored/{name}": value for name, value in scored.items()}
    arrays |= {f"asked/{name}": value for name, value in asked.items()}
    np.savez(tmp_path / "inputs.npz", **arrays)
    program = Path(__file__).parent / "alone.py"
    files = (tmp_path / "inputs.npz", tmp_path / "outputs.npz")
    subprocess.run(
        [sys.executable, program, format, folder, *files], check=True, cwd="/"
    )
    with np.load(tmp_path / "outputs.npz") as file:
        found = dict(file)
    # On from the last token before the response.
    logits = run(lambda x: model(x), scored)[:, -weights.shape[1] - 1 : -1]
    found["wanted"] = keras.ops.convert_to_numpy(logits)
    found["texts"] = model.generate(batch)
    return found


def same_texts(model, ids, texts):
    """Say whether ids, up to their stops, are these texts."""
    stop = model.preprocessor.tokenizer.end_token_id
    before = np.cumsum(ids == stop, axis=1) == 0
    found = model.preprocessor.generate_postprocess(
        {"token_ids": np.where(before, ids, 0)}
    )
    return list(found) == list(texts)


def test_stablehlo_answers_as_generate(nano, tmp_path):
    nano.export(tmp_path / "made", format="stablehlo")
    found = outputs_of(nano, "stablehlo", tmp_path / "made", tmp_path)
    assert error(found["logits"], found["wanted"]) < 1e-5
    assert same_texts(nano, found["generated"], found["texts"])
    np.testing.assert_array_equal(
        np.where(found["generated"] == 0, 0, found["ids"]), found["generated"]
    )
    assert "a lion, a butterfly and a snail" in found["texts"]
    weights = (NANO / "model.safetensors").stat().st_size
    stored = sum(one.stat().st_size for one in (tmp_path / "made").iterdir())
    assert stored - weights < 400_000


@pytest.fixture(scope="module")
def onnx_folder(tiny, tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx") / "made"
    tiny.export(folder, format="onnx")
    return folder


def test_onnx_has_the_models_logits(tiny, onnx_folder, tmp_path):
    pytest.importorskip("onnxruntime")
    found = outputs_of(tiny, "onnx", onnx_folder, tmp_path)
    assert error(found["logits"], found["wanted"]) < 1e-5
    assert same_texts(tiny, found["ids"], found["texts"])
    weights = sum(one.value.nbytes for one in tiny.backbone.variables)
    assert (onnx_folder / "model.onnx").stat().st_size - weights < 300_000


def test_openvino_has_the_models_logits(tiny, onnx_folder, tmp_path):
    pytest.importorskip("openvino")
    from keras_paligemma.export import onnx_files

    folder = tmp_path / "made"
    folder.mkdir()
    onnx_files.convert_to_openvino(onnx_folder / "model.onnx", folder)
    found = outputs_of(tiny, "openvino", folder, tmp_path)
    assert error(found["logits"], found["wanted"]) < 1e-5
    assert same_texts(tiny, found["ids"], found["texts"])


def test_litert_has_the_models_logits(tiny, tmp_path):
    pytest.importorskip("ai_edge_litert")
    folder = tmp_path / "made"
    tiny.export(folder, format="litert")
    found = outputs_of(tiny, "litert", folder, tmp_path)
    assert error(found["logits"], found["wanted"]) < 1e-5
    assert same_texts(tiny, found["ids"], found["texts"])
    found = outputs_of(tiny, "litert_int8", folder, tmp_path)
    assert 1e-5 < error(found["logits"], found["wanted"]) < 0.1
    whole, small = (
        (folder / name).stat().st_size
        for name in ("model.tflite", "model_int8.tflite")
    )
    assert small < whole / 2


def test_bad_targets_are_refused(tiny, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="in use"):
        tiny.export(tmp_path / "used", format="stablehlo")
    with pytest.raises(ValueError, match="'onnx', 'openvino', 'litert'"):
        tiny.export(tmp_path / "made", format="tensorrt")
    bare = PaliGemmaCausalLM(tiny.backbone, compile=False)
    with pytest.raises(ValueError, match="preprocessor"):
        bare.export(tmp_path / "made", format="stablehlo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"keras_paligemma\[targets\]"):
        tiny.export(tmp_path / "made", format="onnx")
    assert not (tmp_path / "made").exists()
