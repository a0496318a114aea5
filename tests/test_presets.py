import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import downloads
from keras_paligemma import presets
from keras_paligemma.checkpoints import formats

OFFICIAL = json.loads(
    (Path(__file__).parent / "golden" / "official_shapes.json").read_text()
)
PUBLISHED = [
    *(
        f"pali_gemma2_{kind}_{size}_{resolution}"
        for kind, resolutions in {
            "pt": (224, 448, 896),
            "mix": (224, 448),
        }.items()
        for size in ("3b", "10b", "28b")
        for resolution in resolutions
    ),
    # KerasHub's spelling.
    "pali_gemma_2_ft_docci_3b_448",
    "pali_gemma2_ft_docci_10b_448",
    *(f"pali_gemma_3b_{resolution}" for resolution in (224, 448, 896)),
    *(f"pali_gemma_3b_mix_{resolution}" for resolution in (224, 448)),
]
EMBEDDED = {"pali_gemma2_nano_112"}
VISION_FIELDS = """
    patch_size num_layers hidden_dim num_heads intermediate_dim
    layer_norm_epsilon
""".split()
TEXT_FIELDS = """
    vocabulary_size num_layers hidden_dim num_query_heads num_key_value_heads
    head_dim intermediate_dim query_pre_attention_scalar
    attention_logit_soft_cap final_logit_soft_cap use_post_norms
    sliding_window_size rope_base rms_norm_epsilon
""".split()

published = pytest.mark.parametrize("name", PUBLISHED)


def is_paligemma_2(name):
    return not name.startswith("pali_gemma_3b")


@pytest.fixture
def config():
    preset = presets.config("pali_gemma2_pt_3b_224")
    backbone = replace(preset.backbone, dtype="bfloat16")
    return replace(preset, name="mine", backbone=backbone)


@pytest.fixture
def folder(tmp_path, config):
    """Write a complete model folder."""
    presets.write_config(tmp_path, config)
    for file in (presets.WEIGHTS, presets.TOKENIZER):
        (tmp_path / file).write_bytes(b"content")
    return tmp_path


# Data


def test_names_are_complete():
    assert len(PUBLISHED) == 22
    assert set(presets.names()) - EMBEDDED == set(PUBLISHED)
    assert list(presets.names()) == sorted(presets.names())


@published
def test_fields_are_complete_and_in_one_order(name):
    preset = presets.describe(name)
    assert list(preset) == [
        "name",
        "description",
        "license",
        "parameters",
        "backbone",
        "preprocessor",
        "handles",
    ]
    assert preset["name"] == name
    assert preset["description"].endswith(".")
    assert "https://ai.google.dev/gemma/terms" in preset["license"]
    backbone = preset["backbone"]
    assert list(backbone) == ["image_size", "vision_encoder", "text_decoder"]
    assert list(backbone["vision_encoder"]) == VISION_FIELDS
    assert list(backbone["text_decoder"]) == TEXT_FIELDS
    assert list(preset["preprocessor"]) == [
        "resize",
        "prompt_length",
        "response_length",
    ]


def count_parameters(backbone):
    """Count the parameters of a model from its sizes alone."""
    vision, text = backbone["vision_encoder"], backbone["text_decoder"]
    width, mlp = vision["hidden_dim"], vision["intermediate_dim"]
    patch = vision["patch_size"]
    tokens = (backbone["image_size"] // patch) ** 2
    norm = 2 * width
    attention = 4 * (width + 1) * width
    block = 2 * norm + attention + (width + 1) * mlp + (mlp + 1) * width
    embedding = (3 * patch**2 + 1) * width + tokens * width
    total = embedding + vision["num_layers"] * block + norm

    depth, width = text["num_layers"], text["hidden_dim"]
    total += (vision["hidden_dim"] + 1) * width
    # Queries and the output have N heads; keys and values have K.
    heads = 2 * (text["num_query_heads"] + text["num_key_value_heads"])
    norms = 4 if text["use_post_norms"] else 2
    block = (heads * text["head_dim"] + 3 * text["intermediate_dim"]) * width
    block += norms * width
    return total + depth * block + (text["vocabulary_size"] + 1) * width


@published
def test_parameters(name):
    preset = presets.describe(name)
    assert preset["parameters"] == count_parameters(preset["backbone"])
    if is_paligemma_2(name):
        size = re.search(r"_(\d+b)_", name)[1]
        resolution = preset["backbone"]["image_size"]
        official = OFFICIAL[f"{size}_{resolution}"]
        assert preset["parameters"] == official["total"]


@published
def test_sizes_are_the_official_ones(name):
    backbone = presets.describe(name)["backbone"]
    text = backbone["text_decoder"]
    assert name.endswith(f"_{backbone['image_size']}")
    is_2 = is_paligemma_2(name)
    assert text["use_post_norms"] is is_2
    assert text["attention_logit_soft_cap"] == (50 if is_2 else None)
    assert text["final_logit_soft_cap"] == (30 if is_2 else None)
    scalar = 144 if "28b" in name else 256
    assert text["query_pre_attention_scalar"] == scalar
    if is_2:
        size = re.search(r"_(\d+b)_", name)[1]
        shapes = OFFICIAL[f"{size}_{backbone['image_size']}"]["shapes"]
        layers = "params/llm/layers"
        depth, heads, width, head_dim = shapes[f"{layers}/attn/q_einsum/w"]
        assert (
            shapes[f"{layers}/attn/kv_einsum/w"][2]
            == (text["num_key_value_heads"])
        )
        assert (depth, heads, width, head_dim) == (
            text["num_layers"],
            text["num_query_heads"],
            text["hidden_dim"],
            text["head_dim"],
        )
        assert shapes[f"{layers}/mlp/linear"][1] == text["intermediate_dim"]


@published
def test_sequences_fill_whole_tiles(name):
    """Fused attention kernels require lengths that are multiples of 128."""
    preset = presets.describe(name)
    backbone, lengths = preset["backbone"], preset["preprocessor"]
    patch = backbone["vision_encoder"]["patch_size"]
    image_tokens = (backbone["image_size"] // patch) ** 2
    text_tokens = lengths["prompt_length"] + lengths["response_length"]
    assert (image_tokens + text_tokens) % 128 == 0
    if "docci" in name:
        assert lengths["response_length"] >= 512


@published
def test_handles(name):
    handles = presets.describe(name)["handles"]
    generation = 2 if is_paligemma_2(name) else 1
    size = re.search(r"_(\d+b)_", name)[1]
    kind = re.search("docci|mix|$", name)[0]
    kind = {"docci": "ft-docci", "mix": "mix", "": "pt"}[kind]
    resolution = name.rsplit("_", 1)[1]
    second = {1: "", 2: "2"}[generation]
    model = f"paligemma{second}-{size}-{kind}-{resolution}"
    jax = {1: "paligemma", 2: "paligemma-2"}[generation]
    assert handles["kaggle_jax"] == f"kaggle://google/{jax}/jax/{model}"
    assert handles["huggingface_transformers"] == f"hf://google/{model}"
    assert handles["huggingface_jax"] == f"hf://google/{model}-jax"
    # Kaggle's name differs from the preset's only here.
    kaggle = name.replace("mix_28b", "28b_mix")
    assert re.fullmatch(
        rf"kaggle://keras/paligemma{second}/keras/{kaggle}/[234]",
        handles["kaggle_keras"],
    )


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("pali_gemma2_pt_3b_896", "2"),
        ("pali_gemma2_mix_10b_224", "3"),
        ("pali_gemma2_pt_28b_224", "4"),
        ("pali_gemma2_pt_28b_448", "3"),
        ("pali_gemma2_mix_28b_448", "3"),
        ("pali_gemma_2_ft_docci_3b_448", "2"),
        ("pali_gemma2_ft_docci_10b_448", "3"),
        ("pali_gemma_3b_mix_224", "4"),
    ],
)
def test_kaggle_versions(name, version):
    handle = presets.describe(name)["handles"]["kaggle_keras"]
    assert handle.endswith(f"/{version}")


# Resolving names


@pytest.mark.parametrize("source", [str, Path], ids=["str", "path"])
def test_resolve_folder(folder, config, source):
    assert presets.locate(source(folder)) == folder
    assert presets.read_folder(folder) == config


def test_name_without_weights():
    name = "pali_gemma2_mix_28b_224"
    assert presets.locate(name, load_weights=False) is None
    for handle in presets.describe(name)["handles"].values():
        assert presets.published(handle) == name
        # A path is a folder, even if a model has its name.
        assert presets.published(Path(name)) is None
        assert presets.locate(handle, load_weights=False) is None


def test_name_is_fetched_from_the_first_hub_that_gives_it(monkeypatch, folder):
    asked = []

    def fetch(path):
        asked.append(path)
        if path.startswith("google"):
            raise RuntimeError("403: gated")
        return str(folder)

    fake_hubs(monkeypatch, fetch)
    assert presets.locate("pali_gemma2_mix_28b_224") == folder
    assert asked == [
        "google/paligemma2-28b-mix-224",
        "keras/paligemma2/keras/pali_gemma2_28b_mix_224/3",
    ]


def test_no_hub_gives_it(monkeypatch):
    def fetch(path):
        raise RuntimeError("403: gated")

    fake_hubs(monkeypatch, fetch)
    with pytest.raises(OSError) as error:
        presets.locate("pali_gemma2_mix_28b_224")
    message = str(error.value)
    assert (
        "kaggle://keras/paligemma2/keras/pali_gemma2_28b_mix_224/3" in message
    )
    assert "https://www.kaggle.com/models/keras/paligemma2)" in message
    assert "https://huggingface.co/google/paligemma2-28b-mix-224)" in message
    assert "load_weights=False" in message
    assert "Gemma Terms" in message


def test_resolve_embedded_preset(folder, monkeypatch, config):
    """The name has a folder beside the descriptions."""
    monkeypatch.setattr(presets, "_HERE", folder.parent)
    described = folder.parent / "pali_gemma2_pt_3b_224.json"
    described.write_text(json.dumps(config.to_dict()))
    assert folder.name in presets.names()
    assert presets.locate(folder.name) == folder
    assert presets.describe(folder.name) == presets.HEADER | config.to_dict()


def test_unknown_name():
    with pytest.raises(ValueError, match="pali_gemma2_pt_3b_224") as error:
        presets.locate("paligemma2_pt_3b_224")
    assert "folder" in str(error.value)
    with pytest.raises(ValueError, match="'pali_gemma2_pt_3b_224'"):
        presets.describe("pali_gemma2_pt_3b_225")


@pytest.mark.parametrize(
    "source", ["x" * 5000, "a\0b", "x/" * 5000, "~nobody_of_this_name/a"]
)
def test_names_that_nothing_can_have(source):
    with pytest.raises(ValueError, match="no preset and no folder") as error:
        presets.locate(source)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("source", [None, 5, ["a"]], ids=repr)
def test_what_is_no_source(source):
    with pytest.raises(ValueError, match="a name or a path. Received: "):
        PaliGemmaCausalLM.from_preset(source)


def test_unknown_folder(tmp_path):
    with pytest.raises(ValueError, match="no preset and no folder"):
        presets.locate(tmp_path / "absent")


def test_missing_files_are_named(folder):
    (folder / presets.WEIGHTS).unlink()
    (folder / presets.TOKENIZER).unlink()
    with pytest.raises(ValueError, match="save_to_preset") as error:
        presets.read_folder(folder)
    assert "model.safetensors, tokenizer.model" in str(error.value)
    assert presets.read_folder(folder, load_weights=False)
    (folder / presets.CONFIG).unlink()
    with pytest.raises(ValueError, match="lacks config.json"):
        presets.read_folder(folder, load_weights=False)


def test_no_preprocessor_needs_no_tokenizer(folder, config):
    presets.write_config(folder, replace(config, preprocessor=None))
    (folder / presets.TOKENIZER).unlink()
    assert presets.read_folder(folder).preprocessor is None


# The config format


def test_write_config_replaces_the_file(folder, config):
    path = presets.write_config(folder, replace(config, name="other"))
    assert json.loads(path.read_text())["name"] == "other"
    files = {file.name for file in folder.iterdir()}
    assert files == {presets.CONFIG, presets.WEIGHTS, presets.TOKENIZER}
    again = presets.read_folder(folder)
    presets.write_config(folder / "new" / "copy", again)
    copy = folder / "new" / "copy" / presets.CONFIG
    assert copy.read_bytes() == path.read_bytes()


def test_a_folder_of_others_is_not_written_over(folder, config, monkeypatch):
    """A folder with a damaged config is not overwritten, either."""
    monkeypatch.setenv("HOME", str(folder.parent))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for text in ('{"model_type": "paligemma"}', "{", None):
        if text is None:
            (folder / presets.CONFIG).unlink()
            del before[folder / presets.CONFIG]
        else:
            (folder / presets.CONFIG).write_text(text)
            before[folder / presets.CONFIG] = text.encode()
        for path in (folder, f"~/{folder.name}"):
            with pytest.raises(ValueError, match="did not write and would"):
                presets.replaced(path)
        assert before == {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is a file"):
        presets.replaced(folder / presets.WEIGHTS)


def without(config, *keys):
    *parents, last = keys
    for key in parents:
        config = config[key]
    del config[last]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: without(c, "name"), "name is missing"),
        (lambda c: c.update(extra=1), "extra is unknown"),
        (lambda c: c.update(backbone=3), "backbone.image_size is missing"),
        (lambda c: without(c, "preprocessor"), "preprocessor is missing"),
        (lambda c: c.update(preprocessor=3), "preprocessor.resize is missing"),
        (
            lambda c: without(c, "preprocessor", "resize"),
            "preprocessor.resize is missing",
        ),
        (lambda c: without(c, "backbone", "dtype"), "backbone.dtype"),
        (
            lambda c: without(c, "backbone", "text_decoder", "head_dim"),
            "backbone.text_decoder.head_dim is missing",
        ),
        (
            lambda c: c["backbone"]["vision_encoder"].update(depth=27),
            "backbone.vision_encoder.depth is unknown",
        ),
    ],
)
def test_wrong_fields(tmp_path, config, spoil, message):
    fields = presets.HEADER | config.to_dict()
    spoil(fields)
    (tmp_path / presets.CONFIG).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        presets.read_folder(tmp_path)


def test_options_that_files_may_lack(tmp_path, config):
    """The first version's files lack these options."""
    fields = presets.HEADER | config.to_dict()
    for part, keys in {
        "preprocessor": ("on_long_prompt", "on_long_response"),
        "backbone": ("lora", "quantization"),
    }.items():
        for key in keys:
            del fields[part][key]
    (tmp_path / presets.CONFIG).write_text(json.dumps(fields))
    assert presets.read_folder(tmp_path, load_weights=False) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"name": "mi', "cannot be read as JSON"),
        (b'{"name": "\xff"}', "cannot be read as JSON"),
        (b"[]", "received None"),
        (b'{"model_type": "paligemma"}', "expected format="),
        (
            b'{"format": "keras_paligemma", "format_version": 2}',
            "expected format_version=1, received 2. A newer",
        ),
    ],
)
def test_config_of_another_kind(folder, text, message):
    (folder / presets.CONFIG).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        presets.read_folder(folder)


# Hubs


def fake_hubs(monkeypatch, fetch, weights=True):
    """Replace both hub clients with `fetch`."""

    def snapshot_download(path, revision, allow_patterns):
        assert ("*.safetensors" in allow_patterns) is weights
        assert "*.json" in allow_patterns and "*.model" in allow_patterns
        assert revision is None
        return fetch(path)

    hf = types.SimpleNamespace(snapshot_download=snapshot_download)
    kaggle = types.SimpleNamespace(model_download=fetch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hf)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)


@pytest.mark.parametrize("handle", ["hf://me/m", "kaggle://me/m/keras/v/1"])
def test_resolve_handle(monkeypatch, folder, handle):
    asked = []

    def fetch(path):
        asked.append(path)
        return str(folder)

    fake_hubs(monkeypatch, fetch)
    assert presets.locate(handle) == folder
    assert asked == [handle.partition("://")[2]]


def test_small_files_of_a_handle(monkeypatch, folder):
    monkeypatch.setattr(presets, "names", lambda: ())
    fake_hubs(monkeypatch, lambda path: str(folder), weights=False)
    assert presets.locate("hf://me/m", load_weights=False) == folder


@pytest.mark.parametrize("has_task", [False, True])
def test_small_files_of_kaggle(monkeypatch, folder, has_task):
    asked = []

    def model_download(handle, path):
        assert handle == "me/m/keras/v/1"
        asked.append(path)
        if path != "config.json" and not has_task:
            raise RuntimeError("404")
        return str(folder / path)

    client = types.SimpleNamespace(model_download=model_download)
    monkeypatch.setitem(sys.modules, "kagglehub", client)
    handle = "kaggle://me/m/keras/v/1"
    assert presets.locate(handle, load_weights=False) == folder
    assert asked[0] == "config.json"
    assert "assets/tokenizer/vocabulary.spm" in asked
    assert not any("weights" in path for path in asked)


def test_a_tokenizer_is_fetched_without_weights(monkeypatch, folder):
    """Only the tokenizer of a published model must be downloaded."""
    fake_hubs(monkeypatch, lambda path: str(folder), weights=False)
    for name in ("pali_gemma2_pt_3b_224", "hf://google/paligemma2-3b-pt-224"):
        checkpoint = formats.resolve(name, False, tokenizer=True)
        assert checkpoint.tokenizer == folder / presets.TOKENIZER
        assert checkpoint.config.backbone.image_size == 224
        assert formats.resolve(name, False).tokenizer is None


def test_failed_download(monkeypatch):
    def fetch(path):
        raise RuntimeError("403")

    fake_hubs(monkeypatch, fetch)
    page = r"https://huggingface.co/me/m\)\n.*403\n.*licence"
    with pytest.raises(OSError, match=page):
        downloads.download("hf://me/m")
    page = r"https://www.kaggle.com/models/me/m\)"
    with pytest.raises(OSError, match=page):
        downloads.download("kaggle://me/m/keras/v/1")


@pytest.mark.parametrize(
    ("handle", "client"),
    [("hf://me/m", "keras_paligemma.hf."), ("kaggle://me/m", "kagglehub")],
)
def test_client_not_installed(monkeypatch, handle, client):
    for module in ("huggingface_hub", "kagglehub"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install '{client}'"):
        downloads.download(handle)


def test_unknown_hub():
    with pytest.raises(ValueError, match="'hf://owner/model'"):
        presets.locate("s3://bucket/model")


@pytest.mark.parametrize("name", ["model.npz", "model[1].npz", "a?*.npz"])
def test_pieces_are_found_by_the_name_of_the_whole(tmp_path, name):
    (tmp_path / f"{name}.part-00000-of-00001").touch()
    assert presets.locate(tmp_path / name) == tmp_path / name
    with pytest.raises(ValueError, match="no preset and no folder"):
        presets.locate(tmp_path / "mode?.npz")
