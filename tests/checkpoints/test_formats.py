"""Loading from any source: big_vision's files, sizes, fields and errors."""

import json
import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.storage import npz
from keras_paligemma.config import TextDecoderConfig
from keras_paligemma.config import VisionEncoderConfig
from keras_paligemma.layers import weight
from keras_paligemma.models import exports
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import NOT_IN_SHAPES
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import golden_inputs
from tests.helpers.tiny_models import run


def logits(backbone):
    """Return a function of inputs that gives the logits of all positions."""
    return lambda inputs: backbone.logits(backbone(inputs))


@pytest.fixture
def pieces(tmp_path):
    """Write the golden bfloat16 checkpoint in pieces, in its own folder."""
    for path in GOLDEN.glob("tiny_headdim.b16.npz.part-*"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_float32_file(expected, form):
    backbone = PaliGemmaBackbone.from_preset(
        GOLDEN / "tiny_headdim.npz", form=form, **NOT_IN_SHAPES
    )
    assert backbone.dtype_policy.name == "float32"
    actual = run(logits(backbone), golden_inputs(expected))
    assert error(actual, expected["f32/llm/logits"]) < 2e-5


@pytest.mark.parametrize("name", ["", "tiny_headdim.b16.npz"])
def test_pieces_by_folder_and_by_stem(pieces, expected, name):
    found = formats.find(pieces / name, NOT_IN_SHAPES)
    assert found.format == "big_vision"
    assert [path.name[-14:] for path in found.files] == [
        f"-{part:05d}-of-00003"[-14:] for part in range(3)
    ]
    backbone = PaliGemmaBackbone.from_preset(
        pieces / name, dtype="float32", **NOT_IN_SHAPES
    )
    actual = run(logits(backbone), golden_inputs(expected))
    whole = PaliGemmaBackbone.from_preset(
        GOLDEN / "tiny_headdim.b16.npz", dtype="float32", **NOT_IN_SHAPES
    )
    wanted = run(logits(whole), golden_inputs(expected))
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(actual), keras.ops.convert_to_numpy(wanted)
    )


def test_the_files_dtype_is_kept(pieces):
    backbone = PaliGemmaBackbone.from_preset(pieces, **NOT_IN_SHAPES)
    assert backbone.dtype_policy.name == "bfloat16"
    assert backbone.token_embedding.table.dtype == "bfloat16"


def test_sizes_are_inferred():
    found = formats.find(GOLDEN / "tiny_headdim.npz", NOT_IN_SHAPES)
    backbone = found.config.backbone
    assert backbone.image_size == 42
    assert backbone.vision_encoder == VisionEncoderConfig(
        patch_size=14,
        num_layers=3,
        hidden_dim=48,
        num_heads=4,
        intermediate_dim=88,
    )
    assert backbone.text_decoder == TextDecoderConfig(
        vocabulary_size=320,
        num_layers=3,
        hidden_dim=64,
        num_query_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_dim=112,
        use_post_norms=True,
        **NOT_IN_SHAPES,
    )
    assert found.variant is None


def test_what_no_shape_tells_is_asked_for():
    with pytest.raises(ValueError, match="final_logit_soft_cap. Pass them"):
        formats.find(
            GOLDEN / "tiny_headdim.npz",
            {
                "query_pre_attention_scalar": 24,
                "attention_logit_soft_cap": None,
            },
        )


def test_a_given_field_changes_the_result(expected):
    backbone = PaliGemmaBackbone.from_preset(
        GOLDEN / "tiny_headdim.npz",
        **NOT_IN_SHAPES | {"final_logit_soft_cap": None},
    )
    assert backbone.text_config.final_logit_soft_cap is None
    actual = run(logits(backbone), golden_inputs(expected))
    # The original trains on these logits: uncapped, text positions only.
    wanted = expected["f32/text_logits"]
    actual = keras.ops.convert_to_numpy(actual)[:, -wanted.shape[1] :]
    assert error(actual, wanted) < 2e-5


def test_a_field_that_a_shape_tells_cannot_be_given():
    with pytest.raises(ValueError, match="'hidden_dim'"):
        formats.find(
            GOLDEN / "tiny_headdim.npz", NOT_IN_SHAPES | {"hidden_dim": 3}
        )


def test_blocks_that_are_not_scanned(arrays, expected, tmp_path):
    """Some big_vision vision towers have separate keys for each block."""
    start = "params/img/Transformer/encoderblock/"
    written = {}
    for key, array in arrays.items():
        if key.startswith(start):
            for layer, part in enumerate(array):
                name = key.replace("encoderblock/", f"encoderblock_{layer}/")
                written[name.removeprefix("params/")] = part
        else:
            written[key.removeprefix("params/")] = array
    np.savez(tmp_path / "x.npz", **written)
    backbone = PaliGemmaBackbone.from_preset(
        tmp_path / "x.npz", **NOT_IN_SHAPES
    )
    actual = run(logits(backbone), golden_inputs(expected))
    assert error(actual, expected["f32/llm/logits"]) < 2e-5


def test_float16_of_the_fine_tuning_notebook(arrays, tmp_path):
    """Attention is float32 and everything else is float16."""
    mixed = {
        key: array if "attn/" in key else array.astype("float16")
        for key, array in arrays.items()
    }
    np.savez(tmp_path / "x.npz", **mixed)
    taken = r"x.npz holds float16 and float32. Taken: dtype='bfloat16'. Pass"
    with pytest.warns(UserWarning, match=taken):
        backbone = PaliGemmaBackbone.from_preset(
            tmp_path / "x.npz", **NOT_IN_SHAPES
        )
    assert backbone.dtype_policy.name == "bfloat16"
    exact = PaliGemmaBackbone.from_preset(
        tmp_path / "x.npz", dtype="float32", **NOT_IN_SHAPES
    )
    table = keras.ops.convert_to_numpy(exact.token_embedding.table)
    np.testing.assert_array_equal(
        table, mixed["params/llm/embedder/input_embedding"].astype("float32")
    )
    asked = PaliGemmaBackbone.from_preset(
        tmp_path / "x.npz", dtype="float16", **NOT_IN_SHAPES
    )
    assert asked.dtype_policy.name == "float16"


@pytest.mark.parametrize("to", ["transformers", "keras_hub"])
def test_float16_of_a_configuration_alone(tiny_model, tmp_path, to):
    """It is computed in the same dtype without the weights."""
    path = tmp_path / "half"
    exports.export(path, to, tiny_model().backbone, dtype="float16")
    both = [formats.find(path, load_weights=flag) for flag in (True, False)]
    assert {found.config.backbone.dtype for found in both} == {"bfloat16"}
    assert both[0].assumed == both[1].assumed
    with pytest.warns(UserWarning, match="float16. Taken: dtype='bfloat16'"):
        backbone = PaliGemmaBackbone.from_preset(path, load_weights=False)
    assert backbone.dtype_policy.name == "bfloat16"


def test_integers_are_no_weights(arrays, tmp_path):
    changed = {key: array.view("int32") for key, array in arrays.items()}
    np.savez(tmp_path / "x.npz", **changed)
    with pytest.raises(ValueError, match="x.npz holds 'params/.* as 'int32'"):
        PaliGemmaBackbone.from_preset(tmp_path / "x.npz", **NOT_IN_SHAPES)


def test_a_tokenizer_for_a_preset_without_a_preprocessor(tmp_path):
    nano = "pali_gemma2_nano_112"
    model = PaliGemmaCausalLM.from_preset(nano, preprocessor=None)
    model.save_to_preset(tmp_path / "bare")
    assert PaliGemmaCausalLM.from_preset(tmp_path / "bare").preprocessor is None
    with pytest.warns(UserWarning, match="Taken: resize='bilinear_antialias'"):
        model = PaliGemmaCausalLM.from_preset(
            tmp_path / "bare",
            tokenizer=presets.locate(nano, True) / "tokenizer.model",
        )
    # The published model of this size has the same lengths.
    known = presets.config(nano).preprocessor
    assert model.preprocessor.prompt_length == known.prompt_length == 32


@pytest.mark.parametrize(
    "name", ["pali_gemma2_pt_28b_448", "pali_gemma_3b_224"]
)
def test_official_sizes_are_recognised(name):
    known = presets.describe(name)["backbone"]
    untold = (
        *NOT_IN_SHAPES,
        "layer_norm_epsilon",
        "rope_base",
        "rms_norm_epsilon",
    )
    partial = {
        "image_size": known["image_size"],
        **{
            tower: {
                key: value
                for key, value in known[tower].items()
                if key not in (*untold, "sliding_window_size")
            }
            for tower in ("vision_encoder", "text_decoder")
        },
    }
    assert presets.variant(partial) == name
    partial["text_decoder"]["num_layers"] += 1
    assert presets.variant(partial) is None


def test_a_published_model_has_the_config_of_a_folder(tmp_path):
    """The licence and handles describe the model and are not written."""
    name = "pali_gemma2_pt_3b_224"
    config = formats.resolve(name, load_weights=False).config
    assert config.backbone.dtype is None
    config = replace(
        config, backbone=replace(config.backbone, dtype="bfloat16")
    )
    presets.write_config(tmp_path, config)
    assert presets.read_folder(tmp_path, load_weights=False) == config


def test_another_picture_size(tmp_path, expected):
    backbone = PaliGemmaBackbone.from_preset(
        GOLDEN / "tiny_headdim.npz", image_size=70, **NOT_IN_SHAPES
    )
    table = backbone.weights_by_name()["vision_encoder/position_embedding"]
    wanted = expected["f32/resample_posemb/5"]
    actual = table.read()
    assert error(actual, wanted.reshape(actual.shape)) < 1e-6
    images = np.zeros((1, 70, 70, 3), "float32")
    assert backbone.encode_images(images).shape == (1, 25, 64)


# Writing


@pytest.mark.parametrize("piece_size", [None, 200_000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_written_as_big_vision(arrays, tmp_path, form, dtype, piece_size):
    source = (
        "tiny_headdim.npz" if dtype == "float32" else "tiny_headdim.b16.npz"
    )
    backbone = PaliGemmaBackbone.from_preset(
        GOLDEN / source, form=form, **NOT_IN_SHAPES
    )
    model = PaliGemmaCausalLM(backbone)
    model.export_to_big_vision(tmp_path / "x.npz", piece_size=piece_size)
    paths = npz.find_pieces(tmp_path / "x.npz")
    assert (len(paths) > 1) == (piece_size is not None)
    with (
        npz.open_npz(paths) as written,
        npz.open_npz([GOLDEN / source]) as wanted,
    ):
        assert written.shapes == wanted.shapes
        assert written.dtypes == wanted.dtypes
        for key in wanted.shapes:
            one, two = written.read(key), wanted.read(key)
            assert one.tobytes() == two.tobytes()


# Errors


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"Received: \['notes.txt'\]"):
        formats.find(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="keys .'model_type'"):
        formats.find(tmp_path)


def test_weights_without_their_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="the folder that it lies in"):
        formats.find(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.gguf", "GGUF.*quantize='int4'"),
        ("model.pth", "pickle of Torch.*save_pretrained"),
        ("pytorch_model.bin", "pickle of Torch.*save_pretrained"),
        ("model.keras", "keras.models.load_model"),
    ],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, match):
    (tmp_path / name).write_bytes(b"")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name} is a.*{match}"):
            formats.find(path)


def test_two_checkpoints_in_a_folder(tmp_path):
    for name in ("a.npz", "b.npz"):
        shutil.copy(GOLDEN / "tiny_headdim.npz", tmp_path / name)
    with pytest.raises(ValueError, match="several checkpoints"):
        formats.find(tmp_path)


def test_hidden_files_are_no_checkpoints(tmp_path):
    """A copy from a bucket has a note beside it, a killed write its draft."""
    folder = tmp_path / "model.npz"
    (folder / ".x.npz.draft-abcdefgh").mkdir(parents=True)
    (folder / ".x.npz.version").write_text("1")
    with pytest.raises(ValueError, match="no PaliGemma checkpoint"):
        formats.find(folder)
    shutil.copy(GOLDEN / "tiny_headdim.npz", folder / "x.npz")
    found = formats.find(folder, NOT_IN_SHAPES)
    assert found.files == [folder / "x.npz"]


def test_an_npz_of_something_else(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((2, 3), "float32"))
    with pytest.raises(ValueError, match="not those of a PaliGemma"):
        formats.find(tmp_path / "x.npz", NOT_IN_SHAPES)


def test_missing_and_unused_keys_are_listed_together(arrays, tmp_path):
    changed = dict(arrays)
    del changed["params/llm/final_norm/scale"]
    changed["params/llm/other"] = np.zeros((2,), "float32")
    changed["params/img/head/bias"] = np.zeros((3,), "float32")
    np.savez(tmp_path / "x.npz", **changed)
    with pytest.raises(ValueError) as raised:
        PaliGemmaBackbone.from_preset(tmp_path / "x.npz", **NOT_IN_SHAPES)
    message = str(raised.value)
    assert "in 3 places; nothing was loaded" in message
    assert "missing: params/llm/final_norm/scale (64,)" in message
    assert "shape: params/img/head/bias is (3,), expected (64,)" in message
    assert "unused: params/llm/other" in message


def test_a_task_without_a_tokenizer_says_how_to_give_one(pieces):
    with pytest.raises(ValueError, match="tokenizer='paligemma_tokenizer"):
        PaliGemmaCausalLM.from_preset(pieces, **NOT_IN_SHAPES)
    model = PaliGemmaCausalLM.from_preset(
        pieces, preprocessor=None, **NOT_IN_SHAPES
    )
    assert model.preprocessor is None


@pytest.mark.parametrize("to", formats.FORMATS)
def test_damage_gives_no_model_and_leaves_the_files(
    golden_backbone, tmp_path, monkeypatch, to
):
    """In each format, truncation is detected before any value is assigned."""
    path = tmp_path / ("x.npz" if to == "big_vision" else "model")
    exports.export(path, to, golden_backbone())
    fields = NOT_IN_SHAPES if to == "big_vision" else {}
    PaliGemmaBackbone.from_preset(path, **fields)
    (weights,) = formats.find(path, fields).files
    weights.write_bytes(weights.read_bytes()[:-1000])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {file: file.read_bytes() for file in files}
    filled = []
    monkeypatch.setattr(weight, "fill", lambda *args: filled.append(args))
    with pytest.raises(ValueError, match=f"{weights.name}.*cannot be read"):
        PaliGemmaBackbone.from_preset(path, **fields)
    assert not filled
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert before == {file: file.read_bytes() for file in files}


def test_a_configuration_alone_is_not_opened():
    checkpoint = formats.resolve("pali_gemma2_pt_3b_224", load_weights=False)
    with pytest.raises(ValueError, match="load_weights=True"):
        with checkpoint.open():
            pass
