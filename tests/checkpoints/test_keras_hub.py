"""KerasHub's presets: read, compared by value, and written."""

import json
from dataclasses import replace

import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import presets
from keras_paligemma import without_values
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.keras_hub import config as keras_hub_config
from keras_paligemma.checkpoints.keras_hub import weights as keras_hub
from keras_paligemma.checkpoints.storage import h5
from keras_paligemma.config import PreprocessorConfig
from tests.helpers.keras_hub_reference import PREPROCESSOR
from tests.helpers.keras_hub_reference import SHARD_SIZE
from tests.helpers.keras_hub_reference import expected_config
from tests.helpers.keras_hub_reference import in_a_process
from tests.helpers.keras_hub_reference import make_inputs
from tests.helpers.keras_hub_reference import tokenizer
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import run


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Return the folder of presets that KerasHub wrote, with outputs."""
    folder = tmp_path_factory.mktemp("hub")
    in_a_process("make", folder)
    return folder


def saved(path):
    with np.load(f"{path}.npz") as file:
        return dict(file)


def load(folder, **changes):
    """Load our backbone from a KerasHub folder, with changed decoder fields."""
    read = keras_hub_config.read(folder)
    config = read.config.backbone.with_fields(**changes)
    backbone = PaliGemmaBackbone(**config.to_dict())
    with h5.open_h5(read.weights) as found:
        engine.load(backbone.weights_by_name(), keras_hub.rows(config), found)
    return backbone


def outputs(backbone):
    """Return hidden states and logits at valid positions."""
    inputs, valid = make_inputs()
    hidden = run(backbone, inputs)
    logits = backbone.logits(hidden)
    return [ops.convert_to_numpy(x)[valid] for x in (hidden, logits)]


def write(folder, source, preprocessor, *args):
    """Read a KerasHub preset into our backbone, and write it again."""
    config = keras_hub_config.read(source).config
    config = replace(config, preprocessor=preprocessor)
    arrays = engine.write(
        load(source).weights_by_name(),
        keras_hub.rows(config.backbone),
    )
    keras_hub.write(folder, config, arrays, *args)


@pytest.mark.parametrize("version", [1, 2])
def test_equals_kerashub(hub, version):
    read = keras_hub_config.read(hub / f"single{version}")
    assert read.config.backbone == expected_config(version)
    assert read.config.preprocessor is read.tokenizer is None
    hidden, logits = outputs(load(hub / f"single{version}"))
    wanted = saved(hub / f"single{version}")
    assert error(hidden, wanted["hidden"]) < 1e-5
    assert error(logits, wanted["logits"]) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"attention_logit_soft_cap": None},
        {"final_logit_soft_cap": None},
        {"sliding_window_size": None},
        {"query_pre_attention_scalar": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_is_felt(hub, change):
    """Each setting changes the outputs; otherwise agreement proves nothing."""
    _, logits = outputs(load(hub / "single2", **change))
    assert error(logits, saved(hub / "single2")["logits"]) > 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_shards_hold_the_same(hub, version):
    single = keras_hub_config.read(hub / f"single{version}")
    sharded = keras_hub_config.read(hub / f"sharded{version}")
    assert sharded.config == single.config
    assert sharded.weights[0].name == "model.weights.json"
    with (
        h5.open_h5(single.weights) as one,
        h5.open_h5(sharded.weights) as many,
    ):
        assert many.shapes == one.shapes and many.dtypes == one.dtypes
        assert len(one.shapes) == (84 if version == 1 else 90)
        for key in one.shapes:
            np.testing.assert_array_equal(many.read(key), one.read(key))


@pytest.fixture(scope="module")
def written(hub, tmp_path_factory):
    """Return the folders that we wrote, and KerasHub's results on them."""
    folder = tmp_path_factory.mktemp("ours")
    both = (PREPROCESSOR, tokenizer())
    write(folder / "single", hub / "single2", *both)
    write(folder / "new" / "sharded", hub / "single2", *both, SHARD_SIZE)
    # An empty folder may be written to.
    (folder / "first").mkdir()
    write(folder / "first", hub / "single1", None)
    names = ("single", "new/sharded", "first")
    in_a_process("read", *(folder / name for name in names))
    return folder


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("single", 2),
        ("single.task", 2),
        ("new/sharded", 2),
        ("new/sharded.task", 2),
        ("first", 1),
    ],
)
def test_kerashub_reads_what_is_written(hub, written, name, version):
    wanted, found = saved(hub / f"single{version}"), saved(written / name)
    assert found["config"] == wanted["config"]
    weights = [key for key in wanted if key.startswith("weights/")]
    assert len(weights) == (84 if version == 1 else 90)
    for key in (*weights, "hidden", "logits"):
        np.testing.assert_array_equal(found[key], wanted[key])


@pytest.mark.parametrize("name", ["single", "new/sharded"])
def test_kerashub_prepares_inputs_as_is_written(written, name):
    found = saved(written / f"{name}.task")
    images, ids = found["images"], found["token_ids"]
    # The picture is resized, not cropped: the dark edge is still there.
    assert images.shape == (2, 42, 42, 3)
    assert (images[:, :, :10] == -1).all() and (images[:, :, 10:] == 1).all()
    assert ids.shape == (2, 20) and (ids[:, 0] == 2).all()


def test_written_folders(hub, written):
    names = {path.name for path in written.iterdir() if path.is_dir()}
    assert names == {"single", "new", "first"}
    assert (written / "new/sharded/model_00001.weights.h5").exists()
    names = {path.name for path in (written / "first").iterdir()}
    assert names == {"config.json", "metadata.json", "model.weights.h5"}
    metadata = json.loads((written / "first/metadata.json").read_text())
    theirs = json.loads((hub / "single1/metadata.json").read_text())
    assert metadata | {"date_saved": ""} == theirs | {"date_saved": ""}
    found = keras_hub_config.read(written / "single")
    assert found.config.backbone == expected_config(2)
    assert found.config.preprocessor == PreprocessorConfig("bilinear")
    assert found.tokenizer.read_bytes() == tokenizer()


def test_bfloat16_is_exact(hub, tmp_path):
    read = keras_hub_config.read(hub / "bfloat16")
    assert read.config.backbone == expected_config(2, "bfloat16")
    backbone = load(hub / "bfloat16")
    assert {variable.dtype for variable in backbone.variables} == {"bfloat16"}
    write(tmp_path / "ours", hub / "bfloat16", None)
    again = keras_hub_config.read(tmp_path / "ours")
    with (
        h5.open_h5(read.weights) as theirs,
        h5.open_h5(again.weights) as ours,
    ):
        assert set(theirs.dtypes.values()) == {"bfloat16"}
        assert ours.shapes == theirs.shapes and ours.dtypes == theirs.dtypes
        for key in theirs.shapes:
            assert ours.read(key).tobytes() == theirs.read(key).tobytes()
        table = theirs.read("layers/reversible_embedding/vars/0")
    wanted = saved(hub / "bfloat16")
    (key,) = (key for key in wanted if wanted[key].shape == (320, 64))
    np.testing.assert_array_equal(table.astype("float32"), wanted[key])


def test_kerashub_ignores_the_scale_of_28b(hub):
    """Our backbone follows the config, but KerasHub's does not.

    When KerasHub does too, the docstrings that mention this are out of date.
    """
    config = keras_hub_config.read(hub / "scale").config
    text = config.backbone.text_decoder
    assert text.query_pre_attention_scalar == 64 / 4
    found, wanted = saved(hub / "scale"), saved(hub / "single2")
    np.testing.assert_array_equal(found["hidden"], wanted["hidden"])
    content = keras_hub_config.files(config)["config.json"]
    assert json.loads(content)["config"]["query_head_dim_normalize"] is False


def shapes_of_28b():
    """Return KerasHub's names, taken from its sources, at 224 pixels."""
    shapes = {
        "layers/reversible_embedding/vars/0": (257152, 4608),
        "layers/rms_normalization/vars/0": (4608,),
        "layers/pali_gemma_vit/layers/dense/vars/0": (1152, 4608),
        "layers/pali_gemma_vit/layers/dense/vars/1": (4608,),
    }
    encoder = "layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/"
    embeddings = encoder + "vision_embeddings/"
    shapes |= {
        embeddings + "patch_embedding/vars/0": (14, 14, 3, 1152),
        embeddings + "patch_embedding/vars/1": (1152,),
        embeddings + "position_embedding/vars/0": (256, 1152),
        encoder + "encoder_layer_norm/vars/0": (1152,),
        encoder + "encoder_layer_norm/vars/1": (1152,),
    }
    for number in range(27):
        block = f"{encoder}resblocks/pali_gemma_vit_encoder_block"
        block += f"_{number}/" if number else "/"
        for name, shape in {
            "attn/query_proj": (1152, 1152),
            "attn/key_proj": (1152, 1152),
            "attn/value_proj": (1152, 1152),
            "attn/out_proj": (1152, 1152),
            "mlp_dense_1": (1152, 4304),
            "mlp_dense_2": (4304, 1152),
            "layer_norm_1": (1152,),
            "layer_norm_2": (1152,),
        }.items():
            shapes[f"{block}{name}/vars/0"] = shape
            shapes[f"{block}{name}/vars/1"] = shape[-1:]
    for number in range(46):
        block = "layers/pali_gemma_decoder_block"
        block += f"_{number}/" if number else "/"
        for name, shape in {
            "pre_attention_norm": (4608,),
            "attention/query_dense": (32, 4608, 128),
            "attention/key_dense": (16, 4608, 128),
            "attention/value_dense": (16, 4608, 128),
            "attention/output_dense": (32, 128, 4608),
            "post_attention_norm": (4608,),
            "pre_ffw_norm": (4608,),
            "gating_ffw": (4608, 36864),
            "gating_ffw_2": (4608, 36864),
            "ffw_linear": (36864, 4608),
            "post_ffw_norm": (4608,),
        }.items():
            shapes[f"{block}{name}/vars/0"] = shape
    return shapes


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_names_and_shapes_of_28b(form):
    config = presets.config("pali_gemma2_pt_28b_224").backbone
    with without_values():
        backbone = PaliGemmaBackbone(**config.to_dict(), form=form)
    found = engine.shapes(backbone.weights_by_name(), keras_hub.rows(config))
    wanted = shapes_of_28b()
    assert found == wanted
    total = sum(int(np.prod(shape)) for shape in wanted.values())
    assert total == 27_650_192_112


def test_a_file_of_another_version_is_refused(hub):
    read = keras_hub_config.read(hub / "single2")
    config = read.config.backbone.with_fields(use_post_norms=False)
    with without_values():
        backbone = PaliGemmaBackbone(**config.to_dict())
    with h5.open_h5(read.weights) as found:
        with pytest.raises(ValueError, match="unused: .*post_ffw_norm"):
            engine.load(
                backbone.weights_by_name(), keras_hub.rows(config), found
            )
