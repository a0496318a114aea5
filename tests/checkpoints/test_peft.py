"""Importing and exporting PEFT adapters; PEFT itself writes and reads them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import StreamedCrossEntropy
from keras_paligemma.checkpoints.peft import ROOT
from keras_paligemma.checkpoints.peft import newest
from keras_paligemma.checkpoints.peft import rows
from tests.helpers.gradients import gradients
from tests.helpers.processes import LEAN
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import jitted
from tests.helpers.tiny_models import run
from tests.helpers.tiny_models import transformers_backbone
from tests.helpers.tiny_models import transformers_inputs

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("tests.helpers.transformers_reference")

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # PEFT uses a deprecated name of transformers.
        ".*is_gradient_checkpointing:FutureWarning",
        # PEFT's warnings about adapters that it cannot merge.
        ".*ensure_weight_tying:UserWarning",
        ".*lora_bias=True:UserWarning",
        # PEFT mistakes their biases for damaged matrices.
        "Adapter 'default'. .* have invalid shape:UserWarning",
    )
]

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
# The popular list also matches modules of the vision tower.
POPULAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Arguments of PEFT for each kind of adapter.
KINDS = {
    "decoder": {"target_modules": DECODER},
    "vision": {"target_modules": r".*vision_tower.*\.(out_proj|fc1|fc2)"},
    "popular": {"target_modules": POPULAR},
    "all linear": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": [*POPULAR, "linear"],
        "rank_pattern": {r"language_model.layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"k_proj": 7, "linear": 2},
        "use_rslora": True,
    },
    "layers": {
        "target_modules": ["q_proj", "fc1"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora of layers": {
        "target_modules": POPULAR,
        "layers_to_transform": 1,
        "rank_pattern": {"q_proj": 2},
        "use_dora": True,
    },
    "biases of products": {
        "target_modules": ["q_proj", "linear"],
        "lora_bias": True,
    },
    "biases of the targets": {"target_modules": POPULAR, "bias": "lora_only"},
    "all biases": {"target_modules": POPULAR, "bias": "all"},
    "saved modules": {
        "target_modules": ["q_proj", "fc1"],
        "modules_to_save": ["multi_modal_projector", "input_layernorm"],
    },
    "embedding": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
    },
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding and head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "tied embedding": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
TABLES = ("embedding", "head", "embedding and head", "tied embedding")


@pytest.fixture(scope="module")
def base():
    return reference.tiny_transformers_model(seed=3)


def adapted(base, **kind):
    """Return a copy of the model with a random adapter."""
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **kind)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * noise
        elif "lora_" in name:
            parameter.data = 0.3 * noise
        elif parameter.requires_grad:
            parameter.data += 0.1 * noise
    return model.eval()


def logits(backbone, inputs):
    hidden = run(backbone, inputs)
    return keras.ops.convert_to_numpy(backbone.logits(hidden))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_every_kind_is_pefts(base, tmp_path, kind):
    """Logits differ from PEFT's in float64 by at most 7.5e-6, as measured.

    PEFT's own float32 logits differ from them by up to 6.6e-6.
    """
    model = adapted(base, **KINDS[kind])
    model.save_pretrained(tmp_path / "theirs")
    inputs, valid = transformers_inputs()
    wanted = reference.run(model.double(), **inputs)
    plain = reference.run(base, **inputs)
    assert error(plain[valid], wanted[valid]) > 0.1
    # One of the two forms; the next test covers both.
    form = ["unrolled", "scanned"][list(KINDS).index(kind) % 2]
    backbone = transformers_backbone(base, form=form)
    backbone.load_adapter(tmp_path / "theirs")
    found = logits(backbone, inputs)
    assert error(found[valid], wanted[valid]) < 1e-5

    backbone.save_adapter(tmp_path / "ours", base="google/paligemma2")
    if kind in TABLES:
        # As in published models, its table has rows beyond the vocabulary.
        base = copy.deepcopy(base)
        base.resize_token_embeddings(101 + 64)
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "ours"
    ).eval()
    back = reference.run(again, **inputs)[..., :101]
    assert error(back[valid], wanted[valid]) < 1e-5


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
@pytest.mark.parametrize("kind", ["dora", "patterns", "embedding and head"])
def test_off_and_merged(base, tmp_path, kind, form):
    model = adapted(base, **KINDS[kind])
    model.save_pretrained(tmp_path)
    inputs, valid = transformers_inputs()
    wanted = reference.run(model, **inputs)
    plain = reference.run(base, **inputs)
    backbone = transformers_backbone(base, form=form)
    before = weights_of(backbone)
    backbone.load_adapter(tmp_path)
    backbone.adapters.select(None)
    for name, value in before.items():
        np.testing.assert_array_equal(weights_of(backbone)[name], value)
    assert error(logits(backbone, inputs)[valid], plain[valid]) < 1e-5
    backbone.adapters.select("default")
    backbone.adapters.merge()
    # Both round: on one CPU, ours differed from float64 by 1.3e-5, as measured,
    # and by 1.0e-5 before it was merged.
    assert error(logits(backbone, inputs)[valid], wanted[valid]) < 2e-5
    backbone.adapters.unmerge()
    backbone.adapters.select(None)
    for name, value in before.items():
        assert error(weights_of(backbone)[name], value) < 1e-5


def weights_of(backbone):
    """Return the arrays of a model without its adapter's."""
    return {
        name: weight.read()
        for name, weight in backbone.weights_by_name().items()
        if "/adapter_" not in name
    }


def batch():
    """Return inputs for both models, targets and their weights."""
    inputs, _ = transformers_inputs()
    shape = inputs["token_ids"].shape
    targets = np.random.default_rng(0).integers(1, 101, shape)
    return inputs, targets, inputs["response_mask"].astype("float32")


def of_peft(model, inputs, targets, weights):
    """Return the loss of PEFT's model, and its gradients by name."""
    predicted = reference.forward(model, **inputs)
    predicted = predicted[:, -targets.shape[1] - 1 : -1]
    each = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1),
        torch.tensor(targets).flatten(),
        reduction="none",
    )
    chosen = torch.tensor(weights).flatten()
    loss = (each * chosen).sum() / chosen.sum()
    loss.backward()
    return loss.item(), {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def of_ours(backbone, inputs, targets, weights):
    """Return our loss, and its gradients by name."""
    loss = StreamedCrossEntropy(mean="token")

    def function():
        hidden = backbone(inputs)[:, -targets.shape[1] - 1 : -1]
        return loss.stream(hidden, backbone.logits, targets, weights)[0]

    found = keras.ops.convert_to_numpy(jitted(lambda _: function())(0))
    return float(found), gradients(function, backbone)


def pairs_of(backbone, ours, theirs):
    """Yield name, our gradient and PEFT's gradient for every adapter."""
    ours, theirs = dict(ours), dict(theirs)
    pairs = []
    table = rows(backbone.architecture())
    for name in list(ours):
        row, gradient = table[name], ours.pop(name)
        keys = [ROOT + newest(key) for key in row.keys(len(gradient))]
        there = [row.read(theirs.pop(key), gradient.shape[1:]) for key in keys]
        pairs.append((row.name, gradient, np.stack(there)))
    assert not ours and not theirs
    return pairs


def test_loss_and_gradients_are_pefts(base, tmp_path):
    """Compare in float32; the next test compares gradients more strictly."""
    model = adapted(base, **KINDS["popular"])
    model.save_pretrained(tmp_path)
    wanted, theirs = of_peft(model, *batch())
    backbone = transformers_backbone(base)
    backbone.load_adapter(tmp_path)
    found, ours = of_ours(backbone, *batch())
    assert found == pytest.approx(wanted, rel=1e-5)
    for _, gradient, there in pairs_of(backbone, ours, theirs):
        # Both round: each differed from its float64 value by 1.6e-5, as
        # measured.
        assert error(gradient, there) < 2e-5


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs JAX alone")
def test_loss_and_gradients_are_pefts_where_nothing_rounds():
    """In float64 the gradients differed by 2e-14, as measured."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.peft_in_double"],
        cwd=Path(__file__).parents[2],
        env=os.environ | LEAN,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["loss"] < 1e-12
    assert len(found["gradients"]) == 14
    assert max(found["gradients"].values()) < 1e-12


def test_names_of_older_versions(base, tmp_path):
    model = adapted(base, **KINDS["popular"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    renamed = {
        key.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower.vision_model."
        ): array
        for key, array in load_file(path).items()
    }
    save_file(renamed, path)
    inputs, valid = transformers_inputs()
    backbone = transformers_backbone(base)
    backbone.load_adapter(tmp_path)
    wanted = reference.run(model, **inputs)
    assert error(logits(backbone, inputs)[valid], wanted[valid]) < 1e-5


def test_what_does_not_fit_changes_nothing(base, tmp_path):
    adapted(base, **KINDS["decoder"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    arrays = load_file(path)
    key = next(key for key in arrays if "q_proj.lora_A" in key)
    arrays[key] = arrays[key][:, 1:].copy()
    save_file(arrays, path)
    backbone = transformers_backbone(base)
    before = len(backbone.variables)
    with pytest.raises(ValueError, match="nothing was loaded") as raised:
        backbone.load_adapter(tmp_path)
    assert key in str(raised.value)
    assert backbone.lora is None
    assert len(backbone.variables) == before
    assert all(variable.trainable for variable in backbone.variables)


def change_arrays(folder, change):
    """Rewrite an adapter's arrays with a function of their dict."""
    path = folder / "adapter_model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(base, tmp_path, number):
    adapted(base, **KINDS["layers"]).save_pretrained(tmp_path)
    key = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1"

    def damage(arrays):
        arrays[f"{key}.lora_B.weight"][2, 1] = number

    change_arrays(tmp_path, damage)
    backbone = transformers_backbone(base)
    with pytest.raises(ValueError, match="layers.0.mlp.fc1.lora_B.* NaN or"):
        backbone.load_adapter(tmp_path)
    assert backbone.lora is None
    backbone.load_adapter(tmp_path, allow_nonfinite=True)
    values = backbone.adapters.values("default")
    found = values["vision_encoder/blocks/mlp/up/adapter_b"]
    assert np.isfinite(found).sum() == found.size - 1


def lose_layer(arrays):
    for key in list(arrays):
        if "language_model.layers.1.self_attn.q_proj" in key:
            del arrays[key]


def lose_half(arrays):
    del arrays[next(key for key in arrays if "k_proj.lora_B" in key)]


def add_layer(arrays):
    for key in list(arrays):
        if "language_model.layers.1." in key:
            arrays[key.replace("layers.1.", "layers.7.")] = arrays[key] + 0


def add_magnitude(arrays):
    key = next(key for key in arrays if "q_proj.lora_B.weight" in key)
    key = key.replace("lora_B.weight", "lora_magnitude_vector")
    arrays[key] = np.ones(60, "float32")


def add_twice(arrays):
    key = next(key for key in arrays if "q_proj.lora_B.weight" in key)
    other = key.replace("model.language_model.", "language_model.model.")
    arrays[other] = arrays[key] + 0


def adapt_head(arrays):
    arrays["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 48), "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_layer, "missing: adapter_a of query, layer 1"),
        (lose_half, "missing: adapter_b of key, layer 0"),
        (add_layer, r"unused: .*layers\.7.*, of 3 layers"),
        (add_magnitude, "lora_magnitude_vector, which adapter_config.json"),
        (add_twice, "are one tensor"),
        (adapt_head, r"Received: \['base_model.model.lm_head.lora_A.weight'\]"),
    ],
)
def test_tensors_that_do_not_fit(base, tmp_path, change, message):
    adapted(base, **KINDS["decoder"]).save_pretrained(tmp_path)
    change_arrays(tmp_path, change)
    backbone = transformers_backbone(base)
    with pytest.raises(ValueError, match=message):
        backbone.load_adapter(tmp_path)
    assert backbone.lora is None


def test_saved_modules_that_are_not_there(base, tmp_path):
    adapted(base, **KINDS["layers"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    told = json.loads(path.read_text()) | {"modules_to_save": ["linear"]}
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="missing: linear, of modules_to_sav"):
        transformers_backbone(base).load_adapter(tmp_path)


def test_what_is_in_few_bits_has_no_whole_weights(base, tmp_path):
    adapted(base, **KINDS["saved modules"]).save_pretrained(tmp_path)
    sizes = transformers_backbone(base).get_config()
    backbone = PaliGemmaBackbone.from_config(sizes | {"quantization": "int8"})
    with pytest.raises(ValueError, match="whole: .*, which the model has in"):
        backbone.load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base:UserWarning")
def test_an_initialisation_that_changed_the_base(base, tmp_path):
    """Such an adapter is refused, and loads after PEFT has converted it."""
    kind = {"target_modules": POPULAR, "init_lora_weights": "pissa"}
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, **kind)
    )
    # This makes PEFT save the initial adapter.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1
    model.eval().save_pretrained(tmp_path / "as_it_is")
    backbone = transformers_backbone(base)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conv"):
        backbone.load_adapter(tmp_path / "as_it_is")
    inputs, valid = transformers_inputs()
    wanted = reference.run(model, **inputs)
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=tmp_path / "initial",
    )
    backbone.load_adapter(tmp_path / "converted")
    assert error(logits(backbone, inputs)[valid], wanted[valid]) < 1e-5


def test_an_adapter_in_the_home_folder(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    backbone = transformers_backbone(base)
    backbone.enable_lora(2)
    backbone.save_adapter("~/adapter")
    backbone.load_adapter("~/adapter", "again")
    assert list(backbone.adapters.configs) == ["default", "again"]


def test_no_adapter(base, tmp_path):
    backbone = transformers_backbone(base)
    with pytest.raises(ValueError, match="lacks adapter_config.json"):
        backbone.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="lacks adapter_config.json"):
        backbone.load_adapter("~nobody_of_this_name/adapter")
    with pytest.raises(ValueError, match="no such adapter to write"):
        backbone.save_adapter(tmp_path)
