"""Beam search: the original's answers, and properties of the search."""

import numpy as np
import pytest

from keras_paligemma import PaliGemmaCausalLM
from tests.helpers.text_models import build_tiny_model
from tests.helpers.tiny_models import golden_prompts

PICTURE = np.full((20, 30, 3), 200, "uint8")


@pytest.fixture(scope="module")
def model(golden_backbone):
    return PaliGemmaCausalLM(golden_backbone())


@pytest.mark.parametrize("beams", [1, 2, 3, 4])
def test_beams_are_the_originals(model, expected, beams):
    wanted = expected[f"f32/beam/{beams}/tokens"]
    eos = int(expected["f32/decode_eos/eos_token"])
    inputs = golden_prompts(expected, response=11)
    found = model.generate(inputs, 11, stop_token_ids=eos, beams=beams)
    np.testing.assert_array_equal(found[:3, :8], wanted[:3])
    # Row 3 starts with a response of three tokens.
    np.testing.assert_array_equal(found[3, 3:], wanted[3])


def test_all_beams_have_scores(model, expected):
    inputs = golden_prompts(expected)
    options = {"stop_token_ids": 160, "details": True, "beams": 3}
    answers = model.generate(inputs, **options)
    for answer in answers:
        scores = [beam.score for beam in answer.beams]
        assert scores == sorted(scores, reverse=True)
        assert answer.token_ids == answer.beams[0].token_ids
        assert len({beam.token_ids for beam in answer.beams}) == len(
            answer.beams
        )
    # The length penalty favours long answers.
    longer = model.generate(inputs, **options, length_penalty=3.0)
    lengths = [
        [len(result.token_ids) for result in all] for all in (answers, longer)
    ]
    assert sum(lengths[0]) < sum(lengths[1])


def test_a_hook_that_changes_no_probability_changes_no_beam(model, expected):
    inputs = golden_prompts(expected)
    options = {"stop_token_ids": 160, "details": True, "beams": 3}
    wanted = model.generate(inputs, **options)
    found = model.generate(
        inputs, logits_hook=lambda logits_BV, state: logits_BV - 3.0, **options
    )
    for answer, other in zip(found, wanted, strict=True):
        for beam, same in zip(answer.beams, other.beams, strict=True):
            assert beam.token_ids == same.token_ids
            assert beam.score == pytest.approx(same.score, abs=1e-4)


def test_the_best_live_beams_stand_behind_ended_ones(model, expected):
    # The last prompt has a begun answer.
    inputs = {key: x[:3] for key, x in golden_prompts(expected).items()}
    options = {"stop_token_ids": 160, "details": True}
    likeliest = model.generate(inputs, 1, alternatives=3, **options)
    answers = model.generate(inputs, 1, beams=3, **options)
    for answer, greedy in zip(answers, likeliest, strict=True):
        ended, *live = (beam.token_ids for beam in answer.beams)
        wanted = [(token.token_id,) for token in greedy.alternatives[0]]
        assert ended == (160,)
        assert live == [ids for ids in wanted if ids != (160,)][:2]


def test_beams_that_a_search_gives_up_are_no_answers(model, expected):
    """A search ends when no live beam can become the best answer any more."""
    inputs = golden_prompts(expected)
    stops = [158, 134, 305]  # The likeliest first tokens.
    options = {"stop_token_ids": stops, "details": True, "beams": 3}
    for penalty in (0.0, 9.0):
        answers = model.generate(inputs, length_penalty=penalty, **options)
        for answer in answers:
            for beam in answer.beams:
                if beam.finish == "length":
                    assert len(beam.token_ids) == 8 and 0 not in beam.token_ids
        if not penalty:
            found = [
                [beam.token_ids for beam in answer.beams] for answer in answers
            ]
            assert found[:3] == [[(stop,)] for stop in stops]


def test_beams_that_never_stop_are_whole(model, expected):
    inputs = golden_prompts(expected)
    answers = model.generate(inputs, stop_token_ids=None, beams=2, details=True)
    greedy = model.generate(inputs, stop_token_ids=None, details=True)
    for answer, other in zip(answers, greedy, strict=True):
        assert answer.finish == "length" and len(answer.token_ids) == 8
        assert answer.log_probability >= other.log_probability - 1e-3


@pytest.mark.parametrize(
    "options", [{"alternatives": 2}, {"stop_strings": ["x"]}]
)
def test_a_compiled_search_refuses_what_an_asked_one_does(options):
    model = build_tiny_model()
    model.compile(sampler="beam")
    inputs = {"images": [PICTURE], "prompts": ["ocr"]}
    with pytest.raises(ValueError, match="Beams are looked at when they have"):
        model.generate(inputs, details=True, **options)
    model.compile(sampler="greedy")
    with pytest.raises(ValueError, match="Beams are looked at when they have"):
        model.generate(inputs, beams=2, details=True, **options)


def test_a_repeated_prompt_is_in_the_text_of_all_beams():
    asked = {"images": PICTURE, "prompts": "ocr"}
    options = {"beams": 2, "details": True}
    model = build_tiny_model()
    answer = model.generate(asked, 3, **options)
    whole = model.generate(asked, 3, **options, strip_prompt=False)
    assert len(whole.beams) == 2 and whole.text == whole.beams[0].text
    assert [beam.text for beam in whole.beams] == [
        f"ocr\n{beam.text}" for beam in answer.beams
    ]
