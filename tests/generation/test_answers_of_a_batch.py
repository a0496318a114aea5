"""Answers as objects, and how often they compile."""

import dataclasses
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import keep_compilations
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.programs import MOST_PROGRAMS
from keras_paligemma.generation.programs import Programs
from tests.helpers.tiny_models import golden_prompts
from tests.helpers.tiny_models import run


@pytest.fixture(scope="module")
def model(golden_backbone):
    return PaliGemmaCausalLM(golden_backbone())


@pytest.fixture(scope="module")
def inputs(expected):
    return golden_prompts(expected)


def test_log_probabilities_are_those_of_a_pass_without_a_cache(
    tiny_model, examples
):
    model = tiny_model()
    asked = {key: examples[key] for key in ("images", "prompts")}
    answers = model.generate(asked, stop_token_ids=None, details=True)
    x = model.preprocessor.generate_preprocess(asked)
    tokens = np.array([answer.token_ids for answer in answers])
    response = np.broadcast_to(np.arange(20) >= 12, (4, 20))
    complete = x | {
        "token_ids": np.concatenate([x["token_ids"][:, :12], tokens], axis=1),
        "padding_mask": x["padding_mask"] | response,
        "response_mask": response,
    }
    logits = model.backbone.logits(run(model.backbone, complete)[:, -9:-1])
    log_BRV = ops.convert_to_numpy(ops.log_softmax(logits, axis=-1))
    wanted = np.take_along_axis(log_BRV, tokens[..., None], 2)[..., 0]
    found = np.array([answer.log_probabilities for answer in answers])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    for answer, row in zip(answers, wanted, strict=True):
        assert answer.finish == "length"
        assert answer.log_probability == pytest.approx(row.sum(), abs=1e-4)
        assert answer.mean_log_probability == pytest.approx(
            row.mean(), abs=1e-5
        )
    texts = model.generate(asked, stop_token_ids=None)
    assert [answer.text for answer in answers] == texts
    with pytest.raises(dataclasses.FrozenInstanceError):
        answers[0].text = ""


def test_log_probabilities_are_the_originals(model, inputs, expected):
    """The first token differs, since the original does not cap its logits."""
    answers = model.generate(inputs, stop_token_ids=None, details=True)
    found = [answer.log_probabilities[1:] for answer in answers[:3]]
    wanted = expected["f32/decode/logp"][:3, 1:]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_row_that_has_ended_takes_nothing_more(model, inputs, expected):
    eos = int(expected["f32/decode_eos/eos_token"])
    row = int(expected["f32/decode_eos/row"])
    one = {key: value[row] for key, value in inputs.items()}
    wanted = expected["f32/decode_eos/single/tokens"][0]
    answer = model.generate(one, stop_token_ids=eos, details=True)
    assert answer.finish == "stop_token"
    assert list(answer.token_ids) == wanted[wanted != 0].tolist()
    assert len(answer.log_probabilities) == len(answer.token_ids)


def test_a_bucket_is_compiled_once(golden_backbone, inputs):
    model = PaliGemmaCausalLM(golden_backbone())
    wanted = model.generate(inputs, stop_token_ids=None)
    programs = model.make_generate_function()
    np.testing.assert_array_equal(
        model.generate(inputs, stop_token_ids=None), wanted
    )
    before = programs.compilations()
    # Torch records the prefill and the step in the second run.
    assert before == (2 if keras.backend.backend() == "torch" else 1)
    three = {key: value[:3] for key, value in inputs.items()}
    np.testing.assert_array_equal(
        model.generate(three, stop_token_ids=None), wanted[:3]
    )
    longer = {
        key: value if key == "images" else np.pad(value, ((0, 0), (4, 0)))
        for key, value in inputs.items()
    }
    np.testing.assert_array_equal(
        model.generate(longer, stop_token_ids=[7, 9])[0, :5], wanted[0, :5]
    )
    for length in (5, 16):
        found = model.generate(inputs, length, stop_token_ids=None)
        np.testing.assert_array_equal(
            found[:, : min(length, 8)], wanted[:, :length]
        )
        assert found.shape == (4, length)
    assert programs.compilations() == before
    for seed, heat in ((1, 0.5), (2, 1.5)):
        model.generate(inputs, stop_token_ids=None, temperature=heat, seed=seed)
    assert programs.compilations() == 2 * before


def test_functions_that_are_new_each_time_are_forgotten(golden_backbone):
    """For example, hooks that are lambdas in a loop."""
    programs = Programs(PaliGemmaCausalLM(golden_backbone()))
    compiles = keras.backend.backend() != "torch"
    rows = ops.ones((2,))

    def total(model, plan, rows):
        return plan.hooks[0](rows)

    def ask(hook):
        return float(ops.sum(programs(total, Plan(hooks=(hook,)), rows)))

    def kept(rows):
        return rows

    hooks = [lambda x, k=k: k * x for k in range(2 * MOST_PROGRAMS)]
    watched = [weakref.ref(hook) for hook in hooks]
    for number in range(len(hooks)):
        assert ask(hooks[number]) == 2 * number
        hooks[number] = None
        assert ask(kept) == 2  # Kept because it is reused.
        assert len(programs) <= MOST_PROGRAMS
        assert programs.compilations() <= MOST_PROGRAMS * compiles
    gc.collect()
    assert sum(program() is not None for program in watched) < MOST_PROGRAMS


def test_compilations_are_kept_in_a_folder(tmp_path):
    if keras.backend.backend() != "jax":
        with pytest.raises(ValueError, match="Only JAX.*Expected: 'jax'"):
            keep_compilations(tmp_path)
        return
    import jax

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        keep_compilations(tmp_path)
        found = {name: getattr(jax.config, name) for name in names}
        assert list(found.values()) == [str(tmp_path), 0, -1]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
