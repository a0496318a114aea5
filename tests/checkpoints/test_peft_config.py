"""Accepted values of `adapter_config.json`, and what its fields mean."""

import dataclasses
import json

import pytest

from keras_paligemma.checkpoints import peft_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def read(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(PLAIN | changes))
    return peft_config.read(path)


def test_every_field_of_the_installed_peft_is_known():
    """Fields that a newer PEFT adds must be put into one of the lists."""
    peft = pytest.importorskip("peft")
    lists = [
        {"peft_type", *peft_config.READ},
        peft_config.HARMLESS,
        peft_config.UNSUPPORTED,
    ]
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set.union(*map(set, lists)) == fields
    assert sum(map(len, lists)) == len(fields)


def test_what_peft_writes_by_default_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    found = peft_config.read(tmp_path / "adapter_config.json")
    assert (found["r"], found["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "x"}, "lora_alpha is 'x', expected a number other"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": "4"}, "r is '4', expected an integer of 1 to 65536"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": [4]}, r"r is \[4\]"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', expected a number"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true or"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"bias": "some"}, "bias is 'some', expected 'none', 'all' or"),
        ({"bias": []}, r"bias is \[\]"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is .*'4'"),
        ({"rank_pattern": {"(": 4}}, "expected an object of expressions"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern is"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"modules_to_save": [""]}, r"modules_to_save is \[''\]"),
        ({"init_lora_weights": 3}, "init_lora_weights is 3"),
        ({"peft_type": "IA3"}, "describes no low-rank adapter.* 'IA3'"),
        ({"peft_type": None}, "describes no low-rank adapter"),
        ({"alora_invocation_tokens": [5]}, r"'alora_invocation_tokens': \[5\]"),
        ({"layer_replication": [[0, 4]]}, "'layer_replication'"),
        ({"target_parameters": ["weight"]}, "'target_parameters'"),
        ({"use_qalora": True}, "Received: {'use_qalora': True}. Expected"),
        ({"turbo": {"on": 1}}, r"\['turbo'\] may be of a newer PEFT"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **changes)


def test_several_problems_are_told_at_once(tmp_path):
    with pytest.raises(ValueError, match="r is '4'.*lora_alpha is 'x'"):
        read(tmp_path, r="4", lora_alpha="x")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no low-rank adapter"):
        peft_config.read(tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "name",
    ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga"],
)
def test_initialisations_that_peft_converts(tmp_path, name):
    with pytest.raises(
        ValueError,
        match=f"'{name.lower()}'.*path_initial_model_for_weight_conversion",
    ):
        read(tmp_path, init_lora_weights=name)


@pytest.mark.parametrize("name", ["loftq", "of_a_newer_peft"])
def test_initialisations_that_have_to_be_merged(tmp_path, name):
    with pytest.raises(ValueError, match=f"'{name}'.* Merge it") as raised:
        read(tmp_path, init_lora_weights=name)
    assert "path_initial_model" not in str(raised.value)


@pytest.mark.parametrize("name", peft_config.PLAIN_INITIALISATIONS)
def test_initialisations_that_leave_the_base_alone(tmp_path, name):
    """With PEFT itself, the kernel is the same before and after."""
    assert read(tmp_path, init_lora_weights=name)["init_lora_weights"] == name
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    if name is None:
        return
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    before = model[0].weight.detach().clone()
    eva = {"eva_config": peft.EvaConfig()} if name == "eva" else {}
    config = peft.LoraConfig(
        r=4, target_modules=["0"], init_lora_weights=name, **eva
    )
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    kernel = adapted.base_model.model[0].base_layer.weight
    assert torch.equal(kernel, before)


@pytest.mark.parametrize(
    "module",
    [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.10.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.mlp.up_proj",
        "model.multi_modal_projector.linear",
    ],
)
def test_patterns_are_found_as_peft_finds_them(module):
    other = pytest.importorskip("peft.utils.other")
    patterns = {
        "language_model.layers.0.self_attn.q_proj": 3,
        r"layers\.1\d?\.self_attn\.q_proj": 5,
        "q_proj": 7,
        r"^model\.language_model\..*up_proj": 9,
    }
    config = PLAIN | {"rank_pattern": patterns, "alpha_pattern": patterns}
    key = other.get_pattern_key(patterns.keys(), module)
    wanted = patterns.get(key, 4), patterns.get(key, 8)
    assert peft_config.rank_and_alpha(config, module) == wanted
