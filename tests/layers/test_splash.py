"""The fused kernel: compared in an interpreter, and compiled for a TPU."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.compat import compiling_for
from keras_paligemma.data.batches import in_parts
from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.splash import should_use_splash
from keras_paligemma.planning.compiled import Compiler
from keras_paligemma.planning.compiled import has_compiler
from keras_paligemma.planning.job import Job
from keras_paligemma.preprocessing.prompt_and_response import split_prompt
from keras_paligemma.sharding.layouts import Layout
from tests.helpers.attention import PREFIX
from tests.helpers.attention import RESPONSE
from tests.helpers.attention import draw_attention
from tests.helpers.attention import fused
from tests.helpers.attention import plain

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the kernel is JAX's"
)


def value_and_gradients(function, arrays, valid):
    import jax

    *inputs, upstream = arrays

    def weighted(*inputs):
        mixed = function(*inputs)
        return ops.sum(mixed * upstream), mixed * valid[:, :, None, None]

    (_, mixed), gradients = jax.jit(
        jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)
    )(*inputs)
    return [np.asarray(array) for array in (mixed, *gradients)]


@pytest.mark.parametrize("cap", [5.0, None])
def test_kernel_is_the_plain_form(cap):
    arrays, valid = draw_attention()
    ours = value_and_gradients(fused(valid, cap), arrays, valid)
    theirs = value_and_gradients(plain(valid, cap), arrays, valid)
    others = value_and_gradients(
        plain(valid, None if cap else 5.0), arrays, valid
    )
    for our, their, other in zip(ours, theirs, others, strict=True):
        scale = np.abs(their).max()
        np.testing.assert_allclose(our, their, atol=1e-5 * scale, rtol=0)
        # With another cap or none, the difference would be large.
        assert np.abs(our - other).max() > 0.05 * scale


def test_kernel_takes_a_prefix_alone():
    arrays, valid = draw_attention(3, 1)
    ours = fused(valid, 50.0, PREFIX + RESPONSE)(*arrays[:3])
    mask = attention_mask(valid, np.zeros_like(valid))
    theirs = attend(*arrays[:3], mask, 50.0)
    np.testing.assert_allclose(
        np.asarray(ours)[valid], np.asarray(theirs)[valid], atol=5e-5
    )


def test_kernel_runs_where_it_suits():
    assert not should_use_splash(8, 4, 256)
    with compiling_for("tpu"):
        assert should_use_splash(8, 4, 256) and should_use_splash(None, 4, 256)
        assert not should_use_splash(8, 16, 72)
    with compiling_for("gpu"):
        assert not should_use_splash(8, 4, 256)


TEXT = {
    "vocabulary_size": 96,
    "num_layers": 2,
    "hidden_dim": 48,
    "intermediate_dim": 80,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def train_step(**text):
    """Return a training step of a small model, and its arguments."""
    import jax

    backbone = PaliGemmaBackbone(
        28,
        {
            "patch_size": 14,
            "num_layers": 1,
            "hidden_dim": 16,
            "num_heads": 2,
            "intermediate_dim": 24,
        },
        TEXT | text,
        form="scanned",
        remat="block",
    )
    model = PaliGemmaCausalLM(backbone, compile=False)
    model.compile(Adam())
    model.optimizer.build(model.trainable_variables)
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([array.value for array in part] for part in parts)
    ids = np.ones((2, 12), "int32")
    response = np.broadcast_to(np.arange(12) >= 7, ids.shape)
    inputs = {
        "images": np.zeros((2, 28, 28, 3), "float32"),
        "token_ids": ids,
        "padding_mask": ids > 0,
        "response_mask": response,
    }
    data = in_parts(inputs, ids[:, 7:], np.ones((2, 5), "float32"))
    return jax.jit(model.train_step), state, data


def test_step_traced_for_a_tpu_caps_in_the_kernel(monkeypatch):
    from jax.experimental.pallas.ops.tpu import splash_attention

    make = splash_attention.make_splash_mha_single_device
    caps = []

    def noted(*args, attn_logits_soft_cap, **kwargs):
        caps.append(attn_logits_soft_cap)
        return make(*args, attn_logits_soft_cap=attn_logits_soft_cap, **kwargs)

    monkeypatch.setattr(
        splash_attention, "make_splash_mha_single_device", noted
    )
    step, state, data = train_step(attention_logit_soft_cap=37.0)
    with compiling_for("tpu"):
        found = str(step.trace(state, data).jaxpr)
    assert "pallas_call" in found and "splash_mha_dq" in found
    assert caps and set(caps) == {37.0}


@pytest.mark.parametrize("text", [{"sliding_window_size": 3}, {"head_dim": 64}])
def test_what_has_no_kernel_is_traced_without(text):
    step, state, data = train_step(**text)
    with compiling_for("tpu"):
        assert "pallas_call" not in str(step.trace(state, data).jaxpr)


def test_step_without_a_tpu_has_no_kernel():
    step, state, data = train_step()
    assert "pallas_call" not in str(step.trace(state, data).jaxpr)


def test_prefill_traced_for_a_tpu_has_the_kernel():
    import jax

    step, *_ = train_step()
    model = step.__wrapped__.__self__
    ids = np.ones((2, 12), "int32")
    arrays = split_prompt(
        {
            "images": np.zeros((2, 28, 28, 3), "float32"),
            "token_ids": ids,
            "padding_mask": ids > 0,
            "response_mask": ids < 0,
        },
        4,
    )

    def answer(arrays):
        return model.generate_step(arrays)

    with compiling_for("tpu"):
        found = str(jax.make_jaxpr(answer)(arrays))
    assert "pallas_call" in found
    # The code of one layer, in the prefill and not in the loop.
    assert found.count("pallas_call") == 1


@pytest.mark.tpu
@pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")
def test_the_compiler_takes_the_kernel(tmp_path):
    nano = Path(__file__).parents[2] / "presets" / "pali_gemma2_nano_112"
    config = json.loads((nano / "config.json").read_text())
    config["backbone"]["text_decoder"]["head_dim"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = Job(str(tmp_path), 8, 8, 8)
    layout = Layout("weights", 2, 4)
    with Compiler() as compiler:
        found = compiler.compile(job, layout, "block", "v5e:2x4")
    assert found["fits"]
