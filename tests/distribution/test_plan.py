"""Plans by arithmetic, and by the TPU's compiler where it is installed."""

import json
import math

import keras
import pytest
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma.distribution import auto
from keras_paligemma.distribution import machines
from keras_paligemma.distribution.compiled import has_compiler
from keras_paligemma.distribution.job import Job
from keras_paligemma.distribution.job import chip_memory
from keras_paligemma.distribution.job import flops
from keras_paligemma.distribution.layouts import Layout
from keras_paligemma.distribution.plan import make_plan
from keras_paligemma.distribution.plan import show

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX's step is planned"
)
DEVICES = [f"cpu:{i}" for i in range(8)]


def by_arithmetic(*arguments, **changes):
    return make_plan(*arguments, **{"compiler": False, **changes})


def test_the_command_writes_json():
    arguments = "plan --preset pali_gemma2_pt_3b_224 --slice v5e-8 --estimate"
    result = CliRunner().invoke(
        cli.app, [*arguments.split(), "--json"], catch_exceptions=False
    )
    found = json.loads(result.output)
    assert found["fits"] and found["source"] == "estimate"
    # Copies fit: no weight is shared.
    assert found["best"]["layout"] == "data 8x1"
    assert 5.6 < found["best"]["hbm_gib"] < 15.75
    assert found["best"]["split_gib"]["weights"] == pytest.approx(5.648)
    assert found["smallest"] == "v5e-1"
    compile(found["code"], "paste", "exec")


def test_weights_are_shared_where_they_must_be():
    job = Job("pali_gemma2_pt_28b_224")
    found = by_arithmetic(job, "v5e-8")
    assert found["fits"] and found["best"]["layout"] != "data 8x1"
    assert found["smallest"] == "v5e-4"
    text = show(found)
    assert "an estimate" in text and "bounds" in text
    assert "enable_lora(rank=8)" in text


def test_what_does_not_fit_says_what_would():
    job = Job("pali_gemma2_pt_28b_224", lora_rank=0)
    found = by_arithmetic(job, "v5e-4")
    assert not found["fits"] and found["best"] is None
    assert "It fits on v5e-" in found["advice"]
    assert "lora_rank=8" in found["advice"]
    assert "does not fit" in show(found)


def test_low_bits_fit_where_floats_do_not():
    job = Job("pali_gemma2_pt_10b_224", batch_size=1)
    assert not by_arithmetic(job, "v5e-1", smallest=False)["fits"]
    job = Job("pali_gemma2_pt_10b_224", batch_size=1, quantize="int8")
    found = by_arithmetic(job, "v5e-1", smallest=False)
    assert found["fits"] and 'quantize="int8"' in found["code"]
    with pytest.raises(ValueError, match="adapters"):
        Job("pali_gemma2_pt_10b_224", lora_rank=0, quantize="int8")


def test_gpus_are_estimated():
    found = by_arithmetic(Job("pali_gemma2_pt_3b_224"), "l4")
    assert found["fits"] and found["source"] == "estimate"
    assert (
        make_plan(Job("pali_gemma2_pt_3b_224"), "a100-40", smallest=False)[
            "source"
        ]
        == "estimate"
    )


def test_machines_that_do_not_exist_name_the_nearest():
    with pytest.raises(ValueError, match="'v5e-8', the nearest"):
        machines.find("v5e-7")
    with pytest.raises(ValueError, match="'a100-40'"):
        machines.find("a100-41")
    with pytest.raises(ValueError, match="weights 1x4"):
        by_arithmetic(Job("pali_gemma2_pt_3b_224"), "v5e-4", "weights 9x9")


def test_flops_of_a_forward_pass_are_twice_the_parameters():
    job = Job("pali_gemma2_pt_3b_224", batch_size=1)
    model = job.model()
    text = model[0].text_decoder.blocks
    values = sum(
        math.prod(one.shape) for one in text.variables if "kernel" in one.path
    )
    plain = flops(job, model[0], None)
    again = flops(job, model[0], "block")
    # 256 image and 128 text tokens; attention adds little.
    assert again - plain == pytest.approx(2 * 384 * values, rel=0.03)
    full = Job("pali_gemma2_pt_3b_224", batch_size=1, lora_rank=0)
    assert flops(full, model[0], None) > 1.4 * plain


def test_state_is_counted_by_its_dtype():
    job = Job("pali_gemma2_pt_3b_224", lora_rank=0)
    found = chip_memory(job, Layout("data"), job.model())
    values = 3_032_094_960
    # Weights and gradients in bfloat16, two moments in float32.
    assert found["trained weights and optimizer"] == pytest.approx(
        values * (2 + 2 + 8), rel=1e-4
    )
    assert found["weights"] == 0


def test_auto_copies_weights_that_fit():
    chosen = auto("pali_gemma2_pt_3b_224", DEVICES, memory_gib=15.75)
    assert isinstance(chosen, keras.distribution.DataParallel)


def test_auto_shares_weights_among_few():
    chosen = auto(
        "pali_gemma2_pt_10b_224", DEVICES, memory_gib=15.75, batch_size=64
    )
    assert chosen.layout.group == 2
    chosen = auto("pali_gemma2_pt_28b_224", DEVICES, memory_gib=15.75)
    assert chosen.layout.group in (4, 8)


def test_auto_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="needs the least"):
        auto("pali_gemma2_pt_28b_224", DEVICES, memory_gib=4)


@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_the_compiler_signs():
    job = Job("pali_gemma2_pt_3b_224", lora_targets=("query", "value"))
    found = make_plan(job, "v5e-8", "weights 1x8", "block", smallest=False)
    assert found["fits"] and found["best"]["source"] == "compiler"
    assert found["best"]["hbm_gib"] < 1.4
    assert found["best"]["split_gib"]["code"] > 0
