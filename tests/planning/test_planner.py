"""Plans by arithmetic, and by the TPU's compiler where it is installed."""

import dataclasses
import json
import math
import shutil
import types

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import cli
from keras_paligemma.planning import Job
from keras_paligemma.planning import compiled
from keras_paligemma.planning import machines
from keras_paligemma.planning import make_plan
from keras_paligemma.planning.compiled import has_compiler
from keras_paligemma.planning.generation import Generation
from keras_paligemma.planning.job import Candidate
from keras_paligemma.planning.training import Training
from keras_paligemma.sharding import auto
from keras_paligemma.sharding import auto_distribution
from keras_paligemma.sharding.layouts import Layout
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION

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
    # Full copies fit, so no weight is sharded.
    assert found["best"]["layout"] == "data 8x1"
    assert 5.6 < found["best"]["hbm_gib"] < 15.75
    assert found["best"]["split_gib"]["weights"] == pytest.approx(5.648)
    assert found["smallest"] == "v5e-1"
    compile(found["code"], "paste", "exec")


def test_weights_are_shared_where_they_must_be():
    job = Job("pali_gemma2_pt_28b_224")
    found = by_arithmetic(job, "v5e-8")
    assert found.fits and found.best.layout != "data 8x1"
    assert found.smallest == "v5e-4"
    text = str(found)
    assert "an estimate" in text and "bounds" in text
    assert "enable_lora(rank=8)" in text
    # The default rate is for whole weights, and adapters need more.
    assert "model.compile(kp.Adam(1e-3))" in text


def test_what_does_not_fit_says_what_would():
    job = Job("pali_gemma2_pt_28b_224", lora_rank=0)
    found = by_arithmetic(job, "v5e-4")
    assert not found.fits and found.best is None and found.code is None
    assert "It fits on v5e-" in found.advice
    assert "lora_rank=8" in found.advice
    assert "does not fit" in str(found)


def test_low_bits_fit_where_floats_do_not():
    job = Job("pali_gemma2_pt_10b_224", batch_size=1)
    assert not by_arithmetic(job, "v5e-1", smallest=False).fits
    job = Job("pali_gemma2_pt_10b_224", batch_size=1, quantize="int8")
    found = by_arithmetic(job, "v5e-1", smallest=False)
    assert found.fits and 'quantize="int8"' in found.code
    job = Job("pali_gemma2_pt_10b_224", lora_rank=0, quantize="int8")
    with pytest.raises(ValueError, match="adapters"):
        by_arithmetic(job, "v5e-1")
    # Answers need no adapters.
    found = by_arithmetic(job, "v5e-1", generate=True, smallest=False)
    assert found.fits and "enable_lora" not in found.code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return folders of a tiny backbone: with an adapter, and in int8."""
    folder = tmp_path_factory.mktemp("saved")
    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT)
    backbone.save_to_preset(folder / "floats")
    backbone.enable_lora(2, targets=("query", "vision.up"))
    backbone.save_to_preset(folder / "adapter")
    PaliGemmaBackbone.from_preset(
        folder / "floats", quantize="int8"
    ).save_to_preset(folder / "int8")
    return {path.name: str(path) for path in folder.iterdir()}


def test_a_presets_own_adapter_is_trained(saved):
    found = by_arithmetic(Job(saved["adapter"]), "v5e-1")
    new = Job(saved["floats"], lora_rank=2, lora_targets=("query", "vision.up"))
    assert found.best == by_arithmetic(new, "v5e-1").best
    assert "enable_lora" not in found.code
    assert by_arithmetic(Job(saved["adapter"], lora_rank=2), "v5e-1").fits
    for changes, message in (
        ({"lora_rank": 4}, "has an adapter of rank 2"),
        ({"lora_targets": ("key",)}, "has an adapter of rank 2"),
        ({"lora_rank": 0}, r"saved after `model.adapters.merge\(\)`"),
    ):
        with pytest.raises(ValueError, match=message):
            by_arithmetic(Job(saved["adapter"], **changes), "v5e-1")


def test_a_preset_in_low_bits_is_planned_as_it_loads(saved):
    found = by_arithmetic(Job(saved["int8"], dtype="float32"), "v5e-1")
    same = Job(saved["floats"], dtype="float32", quantize="int8")
    assert found.best == by_arithmetic(same, "v5e-1").best
    with pytest.raises(ValueError, match="quantised already: int8"):
        by_arithmetic(Job(saved["int8"], quantize="int4"), "v5e-1")
    with pytest.raises(ValueError, match="Weights in low bits.*'int8' for"):
        by_arithmetic(Job(saved["int8"], lora_rank=0), "v5e-1")


def test_gpus_are_estimated():
    found = by_arithmetic(Job("pali_gemma2_pt_3b_224"), "l4")
    assert found.fits and found.source == "estimate"
    found = make_plan(Job("pali_gemma2_pt_3b_224"), "a100-40", smallest=False)
    assert found.source == "estimate"


def test_machines_that_do_not_exist_name_the_nearest():
    with pytest.raises(ValueError, match="'v5e-8', the nearest"):
        machines.find("v5e-7")
    with pytest.raises(ValueError, match="'a100-40'"):
        machines.find("a100-41")
    for name in ("v5e-", "l4x0", "l4x", "l4x²", "l4x10000"):
        with pytest.raises(ValueError, match=f"machine. Received: '{name}'"):
            machines.find(name)


def test_the_smallest_machine_is_no_larger_than_one_that_fits():
    job = Job("pali_gemma2_pt_3b_224", batch_size=6, lora_rank=0)
    found = by_arithmetic(job, "t4x3")
    assert found.fits and found.smallest == "t4x3"


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": "8"},
        {"batch_size": 2.5},
        {"prompt_length": 10.5},
        {"pictures": 0},
        {"lora_rank": -1},
    ],
)
def test_counts_are_integers(values):
    [(name, value)] = values.items()
    message = f"{name} is at least .*integer. Received: {value!r}"
    with pytest.raises(ValueError, match=message):
        Job("pali_gemma2_pt_3b_224", **values)


def test_integers_of_numpy_reach_the_compiler():
    job = Job("pali_gemma2_pt_3b_224", np.int64(4), lora_rank=np.int64(2))
    assert json.loads(json.dumps(dataclasses.asdict(job)))["batch_size"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--slice v5e-7", "'v5e-8', the nearest"),
        ("--slice v5e-4 --layout weights.2x4", "'weights 2x2', the nearest"),
        ("--layout weights.1x8 --batch-size 9", "Expected: 8 or 16."),
        ("--remat all", "'none', 'dots', 'block' or 'pair'"),
        ("--batch-size 0", "batch_size is at least 1"),
        ("--quantize int3", "'int8', 'int4'"),
        ("--quantize int8 --full", "lora_rank=8"),
        ("--generate --full", "Expected: one"),
        ("--full --lora-rank 16", "Received: --full and --lora-rank"),
        ("--lora-rank 0 --lora-targets decoder", "Received: lora_rank=0 and"),
        ("--dtype float8", "Received: dtype='float8'. Expected: one of"),
        ("--cache-dtype int8", "Expected: --generate with it"),
        ("--generate --cache-dtype int4", "Expected: one of (None, 'int8')"),
        ("--generate --layout data.2x4", "'data 8x1', the nearest"),
    ],
)
def test_bad_options_are_told_without_a_trace(options, message, monkeypatch):
    arguments = ["plan", "--preset", "pali_gemma2_pt_3b_224", "--estimate"]
    arguments += [option.replace(".", " ") for option in options.split()]
    monkeypatch.setattr("sys.argv", ["keras-paligemma", *arguments])
    told = []
    monkeypatch.setattr(
        cli.typer, "echo", lambda text, err=False: told.append((text, err))
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    ((text, err),) = told
    assert err and text.startswith("Error: ") and message in text
    assert "\n" not in text


def test_no_remat_has_a_name():
    job = Job("pali_gemma2_pt_3b_224")
    with pytest.raises(ValueError, match="Received: None. Expected: 'none'"):
        by_arithmetic(job, "v5e-1", remat=None)


def test_generating_is_planned():
    arguments = "plan --preset pali_gemma2_pt_3b_224 --slice v5e-1 --generate"
    result = CliRunner().invoke(
        cli.app,
        [*arguments.split(), "--batch-size", "1", "--estimate", "--json"],
        catch_exceptions=False,
    )
    found = json.loads(result.output)
    assert found["fits"] and found["source"] == "estimate"
    split = found["best"]["split_gib"]
    assert split["weights"] == pytest.approx(5.66, abs=0.02)
    # Keys and values of 26 layers, 4 heads of 256, two bytes each.
    cache = 2 * 26 * (256 + 64 + 63) * 4 * 256 * 2
    assert split["cache"] == pytest.approx(cache / 2**30, abs=1e-3)
    # Each token reads all weights once.
    weights = split["weights"] * 2**30
    assert found["best"]["bounds_s"]["decode"] == pytest.approx(
        64 * weights / 819e9, rel=0.01
    )
    assert found["smallest"] == "v5e-1"
    compile(found["code"], "paste", "exec")
    assert "adapter" not in found["code"]
    job = Job("pali_gemma2_pt_3b_224", 1, cache_dtype="int8")
    found = by_arithmetic(job, "v5e-1", generate=True)
    # In int8, a head of 256 has a float32 scale.
    assert found.best.split_gib["cache"] == pytest.approx(
        cache * 260 / 512 / 2**30, abs=1e-3
    )
    compile(found.code, "paste", "exec")
    assert 'cache_dtype="int8"' in found.code
    # A new adapter changes no answer; one that is asked for has its memory.
    adapter = dataclasses.replace(job, lora_rank=4)
    asked = by_arithmetic(adapter, "v5e-1", generate=True)
    assert 'load_adapter("adapter")' in asked.code
    assert "enable_lora" not in asked.code
    assert asked.best.hbm_gib > found.best.hbm_gib
    job = Job("pali_gemma2_pt_28b_224", batch_size=64)
    found = by_arithmetic(job, "v5e-1", generate=True)
    assert not found.fits and found.smallest == "v5e-8"
    assert "Fewer prompts" in str(found)


def test_a_chip_holds_its_share_of_the_answers():
    def split(batch_size, layout, dtype="bfloat16"):
        job = Job("pali_gemma2_pt_3b_224", batch_size, dtype=dtype)
        found = by_arithmetic(
            job, "v5e-8", layout, generate=True, smallest=False
        )
        return found.tried[0].split_gib, found.tried[0].bounds_s

    (tensor, bounds), (floats, _) = (
        split(64, "tensor 1x8", dtype) for dtype in ("bfloat16", "float32")
    )
    # Four key-value heads do not divide by eight.
    cache = 2 * 26 * (256 + 64 + 63) * 4 * 256 * 2 * 64 / 2**30
    assert tensor["cache"] == pytest.approx(cache, abs=1e-3)
    assert floats["cache"] == pytest.approx(2 * cache, abs=1e-3)
    for layout in ("data 8x1", "weights 1x8", "weights 2x4"):
        # 60 prompts are run as 64 rows.
        for batch in (60, 64):
            rows, times = split(batch, layout)
            assert rows["cache"] == pytest.approx(cache / 8, abs=1e-3)
            assert times["prefill"] == bounds["prefill"]
        # Fewer rows than chips: each chip runs them all.
        rows, _ = split(4, layout)
        assert rows["cache"] == pytest.approx(cache / 16, abs=1e-3)


def test_flops_of_a_forward_pass_are_twice_the_parameters():
    job = Job("pali_gemma2_pt_3b_224", batch_size=1)
    training = Training(job, ("block",))
    text = training.models["block"][0].text_decoder.blocks
    values = sum(
        math.prod(variable.shape)
        for variable in text.variables
        if "kernel" in variable.path
    )
    plain, again = training.flops(None), training.flops("block")
    # 256 image tokens and 128 text tokens; attention adds little.
    assert again - plain == pytest.approx(2 * 384 * values, rel=0.03)
    full = Job("pali_gemma2_pt_3b_224", batch_size=1, lora_rank=0)
    assert Training(full, ("block",)).flops(None) > 1.4 * plain


def test_low_bits_compute_as_much_as_floats():
    # Two values of int4 lie in a byte, and each is multiplied.
    floats, packed = (
        Job("pali_gemma2_pt_3b_224", quantize=bits) for bits in (None, "int4")
    )
    trained = [
        Training(job, ("block",)).flops("block") for job in (floats, packed)
    ]
    assert trained[0] == trained[1]
    alone, chip = Candidate(Layout("data")), machines.find("v5e-1")
    answered = [
        Generation(job).bounds(alone, chip)["prefill"]
        for job in (floats, packed)
    ]
    assert answered[0] == answered[1]


def test_state_is_counted_by_its_dtype():
    job = Job("pali_gemma2_pt_3b_224", lora_rank=0)
    found = Training(job, ("block",)).memory(Candidate(Layout("data"), "block"))
    values = 3_032_094_960
    # Weights and gradients are bfloat16, and the two moments are float32.
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
    with pytest.raises(ValueError, match="Expected: 32 devices"):
        auto("pali_gemma2_pt_28b_224", DEVICES, memory_gib=4)
    with pytest.raises(ValueError, match=r"Expected: devices=\['cpu:0'\]"):
        auto("pali_gemma2_pt_3b_224", "cpu:0", memory_gib=16)
    with pytest.raises(ValueError, match="Expected: a batch of 16"):
        auto("pali_gemma2_pt_3b_448", DEVICES[:1], memory_gib=11, batch_size=64)


def test_auto_asks_a_device_of_this_host(monkeypatch):
    """The first device belongs to another host and cannot be queried."""
    import jax

    far = types.SimpleNamespace(id=0, platform="gpu", device_kind="a GPU")
    near = types.SimpleNamespace(
        id=1,
        platform="gpu",
        memory_stats=lambda: {"bytes_limit": 15.75 * 2**30},
    )
    monkeypatch.setattr(jax, "devices", lambda backend: [far, near])
    monkeypatch.setattr(jax, "local_devices", lambda backend: [near])
    assert auto_distribution._memory("gpu:0") == 15.75
    assert auto_distribution._memory(far) == 15.75
    with pytest.raises(ValueError, match="no such device. Received: 'gpu:7'"):
        auto_distribution._memory("gpu:7")


@pytest.mark.parametrize(
    "installed, error, message",
    [
        ("0.12.0", ImportError, "jax 0.12.0, expected 0.10.2.*--estimate"),
        ("0.10.2", RuntimeError, "stopped. It said: $"),
    ],
)
def test_a_compiler_that_stops(installed, error, message, monkeypatch):
    """The error says which versions to install, or reports a failure."""
    monkeypatch.setattr(
        compiled.importlib.metadata,
        "requires",
        lambda package: [
            "jax>=0.10; extra == 'jax'",
            "jax==0.10.2; extra == 'plan'",
        ],
    )
    monkeypatch.setattr(
        compiled.importlib.metadata, "version", lambda name: installed
    )
    monkeypatch.setattr(compiled.sys, "executable", shutil.which("false"))
    job = Job("pali_gemma2_pt_3b_224")
    layout = Layout("data", 1, 1)
    with compiled.Compiler() as compiler:
        with pytest.raises(error, match=f"(?s){message}"):
            compiler.compile(job, layout, "block", "v5e:1x1")


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_the_compiler_signs():
    job = Job("pali_gemma2_pt_3b_224", lora_targets=("query", "value"))
    found = make_plan(job, "v5e-8", "weights 1x8", "block", smallest=False)
    assert found.fits and found.best.source == "compiler"
    assert found.best.hbm_gib < 1.4
    assert found.best.split_gib["code"] > 0


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_the_compiler_signs_generating():
    job = Job("pali_gemma2_pt_3b_224", batch_size=1)
    found = make_plan(job, "v5e-1", smallest=False, generate=True)
    assert found.fits and found.best.source == "compiler"
    # Little more than the weights and the cache.
    assert 5.6 < found.details_gib["first token"] <= found.best.hbm_gib < 6


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_the_compiler_splits_the_rows_of_answers():
    """As `generate` places them on the chips."""
    job = Job("pali_gemma2_nano_112", 256)
    with compiled.Compiler() as compiler:
        layout = Layout("weights", 1, 4)
        found = compiler.compile(job, layout, None, "v5e:2x2", 32)
    # 90 MB; 320 MB if each chip had all rows.
    assert found["together"] < 160e6


def test_pairs_compute_half_a_pass_more_whatever_model_is_asked():
    job = Job("pali_gemma2_pt_3b_224")
    found = [
        [Training(job, (built,)).flops(remat) for built in ("block", "pair")]
        for remat in (None, "block", "pair")
    ]
    (none, same), (block, again), (pair, other) = found
    assert (none, block, pair) == (same, again, other)
    # The frozen encoder's cost is the same. The decoder has an even number of
    # blocks, 26.
    assert pair - none == pytest.approx(1.5 * (block - none))
