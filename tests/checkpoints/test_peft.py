"""Adapters of PEFT, in and out; PEFT itself made and reads them."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_paligemma import StreamedCrossEntropy
from keras_paligemma.checkpoints.peft import rows
from tests.conftest import error
from tests.conftest import jitted
from tests.conftest import run
from tests.conftest import transformers_backbone
from tests.conftest import transformers_inputs
from tests.gradients import gradients

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
reference = pytest.importorskip("tests.transformers_reference")

# PEFT asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)

TARGETS = {
    "decoder": (
        r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ["query", "key", "value", "output", "gate", "up", "down"],
    ),
    # The popular list: it reaches into the vision tower too.
    "both": (
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        [
            "query",
            "key",
            "value",
            "output",
            "vision.query",
            "vision.key",
            "vision.value",
        ],
    ),
    "vision": (
        r".*vision_tower.*\.(out_proj|fc1|fc2)",
        ["vision.output", "vision.up", "vision.down"],
    ),
}


@pytest.fixture(scope="module")
def base():
    return reference.tiny_transformers_model(seed=3)


def adapted(base, target_modules, rslora=False):
    """A copy of the model with random adapters."""
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=target_modules,
            use_rslora=rslora,
        ),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


def logits(backbone, inputs):
    hidden = run(backbone, inputs)
    return keras.ops.convert_to_numpy(backbone.logits(hidden))


@pytest.mark.parametrize("form", ["unrolled", "stacked"])
@pytest.mark.parametrize("which", TARGETS)
def test_from_peft_and_back(base, tmp_path, which, form):
    modules, names = TARGETS[which]
    model = adapted(base, modules)
    model.save_pretrained(tmp_path / "theirs")
    inputs, valid = transformers_inputs()
    wanted = reference.run(model, **inputs)
    backbone = transformers_backbone(base, form=form)
    plain = logits(backbone, inputs)
    backbone.load_adapter(tmp_path / "theirs")
    assert backbone.lora == {
        "rank": 3,
        "alpha": 5,
        "targets": names,
        "dropout": 0.0,
        "rslora": False,
    }
    found = logits(backbone, inputs)
    assert error(found[valid], wanted[valid]) < 1e-5
    assert error(plain[valid], wanted[valid]) > 1e-2

    backbone.save_adapter(tmp_path / "ours", base="google/paligemma2")
    again = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "ours"
    ).eval()
    np.testing.assert_array_equal(reference.run(again, **inputs), wanted)


def batch():
    """Inputs of both models, targets and their weights."""
    inputs, _ = transformers_inputs()
    shape = inputs["token_ids"].shape
    targets = np.random.default_rng(0).integers(1, 101, shape)
    return inputs, targets, inputs["response_mask"].astype("float32")


def of_peft(model, inputs, targets, weights):
    """The loss of PEFT's model, and its gradients by their names."""
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
    """Our loss, and its gradients by our names."""
    loss = StreamedCrossEntropy(mean="token")

    def function():
        hidden = backbone(inputs)[:, -targets.shape[1] - 1 : -1]
        return loss.stream(hidden, backbone.logits, targets, weights)[0]

    found = keras.ops.convert_to_numpy(jitted(lambda _: function())(0))
    return float(found), gradients(function, backbone)


def pairs_of(backbone, ours, theirs):
    """Name, our gradient and theirs of each adapter; of all there are."""
    ours, theirs = dict(ours), dict(theirs)
    pairs = []
    for row in rows(backbone.lora["targets"]):
        gradient = ours.pop(row.ours)
        keys = row.keys(len(gradient))
        there = [row.read(theirs.pop(key), gradient.shape[1:]) for key in keys]
        pairs.append((row.ours, gradient, np.stack(there)))
    assert not ours and not theirs
    return pairs


def test_loss_and_gradients_are_pefts(base, tmp_path):
    """In float32; of the gradients the next test has more to say."""
    model = adapted(base, TARGETS["both"][0])
    model.save_pretrained(tmp_path)
    wanted, theirs = of_peft(model, *batch())
    backbone = transformers_backbone(base)
    backbone.load_adapter(tmp_path)
    found, ours = of_ours(backbone, *batch())
    assert found == pytest.approx(wanted, rel=1e-5)
    for _, gradient, there in pairs_of(backbone, ours, theirs):
        # Both round: from what both are in float64, 1.6e-5 was seen of each.
        assert error(gradient, there) < 2e-5


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="runs JAX alone")
def test_loss_and_gradients_are_pefts_where_nothing_rounds():
    """The same function: in float64, 2e-14 was seen of the gradients."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.peft_in_double"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["loss"] < 1e-12
    assert len(found["gradients"]) == 14
    assert max(found["gradients"].values()) < 1e-12


def test_rank_stabilised_scale(base, tmp_path):
    model = adapted(base, TARGETS["decoder"][0], rslora=True)
    model.save_pretrained(tmp_path)
    inputs, valid = transformers_inputs()
    backbone = transformers_backbone(base)
    backbone.load_adapter(tmp_path)
    wanted = reference.run(model, **inputs)
    assert error(logits(backbone, inputs)[valid], wanted[valid]) < 1e-5


def test_names_of_older_versions(base, tmp_path):
    from safetensors.numpy import load_file
    from safetensors.numpy import save_file

    model = adapted(base, TARGETS["both"][0])
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
    from safetensors.numpy import load_file
    from safetensors.numpy import save_file

    adapted(base, TARGETS["decoder"][0]).save_pretrained(tmp_path)
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "'use_dora': True"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head'"),
        ({"peft_type": "IA3"}, "'IA3'"),
    ],
)
def test_adapters_of_another_kind(base, tmp_path, change, message):
    adapted(base, TARGETS["decoder"][0]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        transformers_backbone(base).load_adapter(tmp_path)


def test_no_adapter(base, tmp_path):
    backbone = transformers_backbone(base)
    with pytest.raises(ValueError, match="lacks adapter_config.json"):
        backbone.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="no such adapter to write"):
        backbone.save_adapter(tmp_path)
