"""Token sampling: draws by options, and invalid options."""

import dataclasses

import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.generation.choosing import sampled
from keras_paligemma.generation.noise import gumbel
from keras_paligemma.generation.options import Options
from tests.helpers.tiny_models import golden_prompts


@pytest.fixture(scope="module")
def model(golden_backbone):
    return PaliGemmaCausalLM(golden_backbone())


@pytest.fixture(scope="module")
def inputs(expected):
    return golden_prompts(expected)


@dataclasses.dataclass
class Unhashable:
    """A hook that is compared by its value, as dataclasses are."""

    bias: float = 0.0

    def __call__(self, logits_BV, state):
        return logits_BV + self.bias


def draw(logits, count=4000, **options):
    """Draw from one row of logits many times."""
    size = len(logits)
    rows = Options(**options).seeded().rows(0, count, 1, size)
    rows["seed"] = rows["seed"][:, 0]
    logits_BV = np.broadcast_to(np.array(logits, "float32"), (count, size))
    return ops.convert_to_numpy(
        sampled(
            ops.convert_to_tensor(logits_BV),
            {key: ops.convert_to_tensor(row) for key, row in rows.items()},
            ops.convert_to_tensor(3, "int32"),
        )
    )


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16, 9, 4, 1]),
        ({"top_k": 2}, [4, 3, 0, 0]),
        ({"top_p": 0.5}, [4, 3, 0, 0]),
        ({"top_p": 0.71}, [4, 3, 2, 0]),
        ({"top_k": 3, "top_p": 0.75}, [4, 3, 0, 0]),
        ({"min_p": 0.4}, [4, 3, 2, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
)
def test_draws_are_of_the_distribution(options, kept):
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    found = np.bincount(draw(logits, seed=5, **options), minlength=4) / 4000
    wanted = np.array(kept) / np.sum(kept)
    assert (found[wanted == 0] == 0).all()
    # Five standard deviations of 4000 draws.
    assert np.abs(found - wanted).max() < 5 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("shift", [0, -100])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"min_p": 0.1}])
def test_the_lowest_temperature_is_greedy(shift, options):
    lowest = np.finfo("float32").tiny
    logits = np.array([50.0, 40.0, 60.0, -1e30]) + shift
    assert (draw(logits, 4, seed=5, temperature=lowest, **options) == 2).all()


def test_noise_is_gumbels_and_no_neighbour_matters():
    seeds = np.arange(50, dtype="int32") * 977
    place = ops.convert_to_tensor(2, "int32")
    noise = ops.convert_to_numpy(
        gumbel(ops.convert_to_tensor(seeds), place, 997)
    )
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.std() == pytest.approx(np.pi / 6**0.5, abs=0.03)
    # Rows and columns are independent.
    near = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(near) < 0.03
    one = gumbel(ops.convert_to_tensor(seeds[7:8]), place, 997)
    np.testing.assert_allclose(
        ops.convert_to_numpy(one)[0], noise[7], rtol=1e-5
    )


def test_a_seed_repeats_its_answers_in_any_batch(model, inputs):
    options = {"stop_token_ids": None, "temperature": 2.0, "top_p": 0.95}
    wanted = model.generate(inputs, seed=3, **options)
    np.testing.assert_array_equal(
        model.generate(inputs, seed=3, batch_size=2, **options), wanted
    )
    one = {key: value[0] for key, value in inputs.items()}
    np.testing.assert_array_equal(
        model.generate(one, seed=3, **options), wanted[0]
    )
    assert (model.generate(inputs, seed=4, **options) != wanted).any()
    # Each prompt has its own seed and temperature.
    greedy = model.generate(inputs, stop_token_ids=None)
    mixed = options | {"temperature": [0, 2.0, 0, 2.0]}
    found = model.generate(inputs, seed=3, **mixed)
    np.testing.assert_array_equal(found[::2], greedy[::2])
    np.testing.assert_array_equal(found[1::2], wanted[1::2])


def test_several_answers_a_prompt(model, inputs):
    options = {"stop_token_ids": None, "temperature": 1.5, "seed": 1}
    found = model.generate(inputs, num_samples=3, details=True, **options)
    assert [len(row) for row in found] == [3] * 4
    assert len({result.token_ids for result in found[0]}) == 3
    best = model.generate(inputs, best_of=3, details=True, **options)
    for result, row in zip(best, found, strict=True):
        assert result.log_probability == max(x.log_probability for x in row)


def test_one_answer_is_drawn_as_the_first_of_several(model, inputs):
    options = {"stop_token_ids": None, "seed": 1}
    one, two = (
        model.generate(inputs, num_samples=count, **options) for count in (1, 2)
    )
    np.testing.assert_array_equal(np.squeeze(one), np.asarray(two)[:, 0])
    best = model.generate(inputs, best_of=1, **options)
    np.testing.assert_array_equal(best, np.squeeze(one))


def test_banned_tokens_are_the_originals(model, inputs, expected):
    banned = expected["f32/decode_banned/mask_logits"]
    found = model.generate(inputs, stop_token_ids=None, banned_token_ids=banned)
    wanted = expected["f32/decode_banned/tokens"][:3]
    np.testing.assert_array_equal(found[:3], wanted)


def test_hooks_see_logits_and_state(model, inputs):
    greedy = model.generate(inputs, stop_token_ids=None)

    def second(logits_BV, state):
        return ops.where(state.position == 1, -logits_BV, logits_BV)

    found = model.generate(inputs, stop_token_ids=None, logits_hook=second)
    np.testing.assert_array_equal(found[:3, 0], greedy[:3, 0])
    assert (found[:3, 1] != greedy[:3, 1]).all()
    twice = model.generate(
        inputs, stop_token_ids=None, logits_hook=[second, second]
    )
    np.testing.assert_array_equal(twice, greedy)


def test_alternatives_hold_what_was_chosen(model, inputs):
    answers = model.generate(
        inputs, stop_token_ids=None, alternatives=3, details=True
    )
    for answer in answers[:3]:
        assert [len(place) for place in answer.alternatives] == [3] * 8
        likeliest = [place[0].token_id for place in answer.alternatives]
        assert likeliest == list(answer.token_ids)
        found = [place[0].log_probability for place in answer.alternatives]
        np.testing.assert_allclose(found, answer.log_probabilities, rtol=1e-6)


def test_hidden_states_are_what_tokens_are_chosen_from(model, inputs):
    options = {"stop_token_ids": None, "details": True}
    answers = model.generate(inputs, hidden_states=True, **options)
    plain = model.generate(inputs, **options)
    assert [result.hidden_states for result in plain] == [None] * 4
    assert answers == plain
    head = model.backbone.logits
    for result in answers[:3]:
        assert result.hidden_states.dtype == "float32"
        assert result.hidden_states.shape == (8, 64)
        log_RV = ops.log_softmax(head(result.hidden_states), axis=-1)
        found = ops.convert_to_numpy(log_RV)[range(8), result.token_ids]
        np.testing.assert_allclose(found, result.log_probabilities, atol=1e-5)
    # With several samples, each has its own values, as many as its tokens.
    rows = model.generate(
        inputs,
        hidden_states=True,
        num_samples=2,
        temperature=2.0,
        seed=0,
        details=True,
        stop_token_ids=list(range(160)),
    )
    for result in (result for row in rows for result in row):
        assert len(result.hidden_states) == len(result.token_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 2, "hidden_states": True}, "hidden_states=True.*without"),
        ({"temperature": -1}, "`temperature`.*0 or more. Received: -1"),
        ({"temperature": float("nan")}, "`temperature`.*Received: nan"),
        ({"temperature": float("inf")}, "`temperature`.*Received: inf"),
        # float32 has no such number.
        ({"temperature": 1e39}, "`temperature`.*Received: 1e[+]39"),
        ({"temperature": 10**400}, "`temperature`.*Received: 1000"),
        ({"temperature": True}, "`temperature`.*Received: True"),
        ({"temperature": [1.0, None]}, "`temperature`.*Received: None"),
        ({"temperature": [[1.0] * 4]}, "`temperature`.*Received: array"),
        ({"top_p": 0}, "`top_p`.*more than 0, at most 1. Received: 0"),
        ({"top_p": 1.5}, "`top_p`.*Received: 1.5"),
        ({"top_k": 321}, "`top_k`.*1 to 320.*Received: 321"),
        ({"top_k": 2.0}, "`top_k`.*Received: 2.0"),
        ({"min_p": 2}, "`min_p`.*0 to 1. Received: 2"),
        ({"top_p": [0.5, 0.0]}, "`top_p`.*Received: 0.0"),
        ({"top_k": 0}, "`top_k`.*Received: 0"),
        ({"min_p": -0.1}, "`min_p`.*Received: -0.1"),
        ({"seed": -1}, "`seed`.*Received: -1"),
        ({"seed": 2**31}, "`seed`.*Received: 2147483648"),
        ({"seed": 1.0}, "`seed`.*Received: 1.0"),
        ({"num_samples": 0}, "`num_samples`.*Received: 0"),
        ({"best_of": 1.0}, "`best_of`.*Received: 1.0"),
        ({"num_samples": 2, "best_of": 2}, "exclude each other"),
        ({"num_samples": 2, "beams": 2}, "exclude each other"),
        ({"alternatives": 321}, "`alternatives`.*0 to 320. Received: 321"),
        ({"beams": 2, "alternatives": 1}, "alternatives=1.*without beams"),
        ({"beams": 2, "length_penalty": None}, "`length_penalty`.*None"),
        ({"beams": 2, "length_penalty": [1.0, 2.0]}, "`length_penalty`.*array"),
        ({"beams": True}, "`beams`.*Received: True"),
        ({"beams": 2, "temperature": 1.0}, "exclude each other"),
        ({"length_penalty": 1.0}, "without beams"),
        ({"banned_token_ids": [320]}, "`banned_token_ids`.*Received: 320"),
        ({"banned_token_ids": 5}, "a list of token ids. Received: 5"),
        ({"temperature": [1.0]}, "`temperature` does not match.*Received: 1"),
        ({"logits_hook": 3}, "function of logits and state"),
        ({"logits_hook": Unhashable()}, "that can be called and hashed"),
        ({"stop_strings": [""]}, "`stop_strings`"),
        ({"stop_strings": ""}, "`stop_strings`"),
        ({"stop_strings": [b"a"]}, "`stop_strings`"),
        ({"temprature": 1}, "Did you mean 'temperature'"),
    ],
)
def test_options_that_mean_nothing(model, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(inputs, stop_token_ids=None, **options)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_k": 1, "top_p": 1, "min_p": 1, "seed": 0},
        {"top_k": 320, "top_p": 1e-6, "min_p": 0, "seed": 2**31 - 1},
        {"temperature": [0, np.float16(1)], "top_k": np.arange(1, 3)},
        {"num_samples": np.int64(2), "alternatives": 320},
        {"beams": 2, "length_penalty": np.float32(0.5)},
        {"stop_strings": None, "choices": None, "regex": None},
    ],
)
def test_options_at_the_ends_of_their_ranges(options):
    options = Options(**options)
    options.check(320)
    assert options.stop_strings == ()


@pytest.mark.any_backend
def test_a_batch_has_its_own_rows_of_options():
    """Its first prompt is the third of all."""
    lists = {
        "temperature": [0, 1, 2],
        "top_k": [1, 2, 3],
        "top_p": [0.5, 1, 1],
        "min_p": [0, 0, 0.5],
        "seed": [3, 4, 5],
    }
    for options in (Options(**lists), Options(seed=7)):
        whole, last = (options.rows(i, 3 - i, 2, 320) for i in (0, 2))
        for name in lists:
            np.testing.assert_array_equal(last[name], whole[name][2:])
        # Copies and prompts differ, even with one seed.
        assert len(set(whole["seed"].ravel().tolist())) == 6
    assert whole["temperature"].tolist() == whole["top_p"].tolist() == [1] * 3
    assert whole["min_p"].tolist() == [0] * 3
    assert whole["top_k"].tolist() == [320] * 3
    for name, each in lists.items():
        options = Options(**{name: each})
        options.check_rows(3)
        with pytest.raises(ValueError, match=f"`{name}` does not.*Received: 3"):
            options.check_rows(2)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("contrastive", "ContrastiveSampler.*loop of its own"),
        (keras_hub.samplers.BeamSampler(return_all_beams=True), "details=True"),
        (keras_hub.samplers.TopKSampler(k=321), "`top_k`.*Received: 321"),
        (keras_hub.samplers.TopPSampler(p=2.0), "`top_p`.*Received: 2.0"),
        (keras_hub.samplers.RandomSampler(temperature=-1.0), "`temperature`"),
    ],
)
def test_samplers_that_cannot_choose(model, sampler, message):
    before = model.sampler
    with pytest.raises(ValueError, match=message):
        model.compile(sampler=sampler)
    assert model.sampler is before


class Own(keras_hub.samplers.RandomSampler):
    """A sampler of a user's, which may draw in any way."""


def test_samplers_of_keras_hub_draw_on(golden_backbone, inputs):
    """The generator's state continues; temperature 0 is greedy."""
    model = PaliGemmaCausalLM(golden_backbone())
    greedy = model.generate(inputs, stop_token_ids=None)
    sampler = keras_hub.samplers.RandomSampler(temperature=2.0, seed=1)
    model.compile(sampler=sampler)
    first, second = (
        model.generate(inputs, stop_token_ids=None) for _ in range(2)
    )
    assert (first != second).any()
    # A seed replaces the generator's state.
    for seeded in (
        sampler,
        keras_hub.samplers.TopPSampler(p=0.9, k=50, temperature=2.0),
    ):
        options = {"temperature": 2.0, "stop_token_ids": None, "seed": 5}
        if seeded is not sampler:
            options |= {"top_p": 0.9, "top_k": 50}
        wanted = model.generate(inputs, **options)
        model.compile(sampler=seeded)
        for _ in range(2):
            found = model.generate(inputs, stop_token_ids=None, seed=5)
            np.testing.assert_array_equal(found, wanted)
    model.compile(sampler=Own())
    with pytest.raises(ValueError, match="`Own` draws by.*seed=5"):
        model.generate(inputs, stop_token_ids=None, seed=5)
    model.compile(sampler=keras_hub.samplers.RandomSampler(temperature=0.0))
    np.testing.assert_array_equal(
        model.generate(inputs, stop_token_ids=None), greedy
    )
