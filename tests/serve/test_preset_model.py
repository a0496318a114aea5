"""Batches of requests of all kinds, and the programs compiled for them."""

import numpy as np
import pytest

from keras_paligemma.generation.answer import Alternative
from keras_paligemma.generation.answer import Answer
from keras_paligemma.serve.preset_model import PresetModel
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Request
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture

PNG = encode(picture(), "PNG")


def test_requests_of_all_kinds_share_a_batch(model):
    served = PresetModel(model, largest=4)

    def request(choice):
        inputs = served.read(PNG, "caption en", choice, Limits())
        return Request(inputs, choice)

    requests = [
        request(Choice()),
        request(Choice(max_new_tokens=3)),
        request(Choice(temperature=1.0, seed=1, top_k=50)),
        request(Choice(temperature=1.0, seed=2)),
    ]
    assert len({served.key(request) for request in requests}) == 1
    together = served.answer(requests, None)
    # Greedy requests run alone in their own program. Sampled requests run
    # beside a copy of themselves.
    alone = [served.answer([request], None)[0] for request in requests[:2]]
    alone += [served.answer([request] * 2, None)[0] for request in requests[2:]]
    assert [answer.text for answer in together] == [
        answer.text for answer in alone
    ]
    assert len(together[1].token_ids) == 3
    np.testing.assert_allclose(
        together[0].log_probabilities, alone[0].log_probabilities, rtol=1e-4
    )


@pytest.mark.parametrize("seed", [1, 3000])
def test_a_seed_draws_as_in_generate(model, seed):
    served = PresetModel(model, largest=4)
    choice = Choice(temperature=1.5, seed=seed, max_new_tokens=8)
    inputs = served.read(PNG, "caption en", choice, Limits())
    requests = [Request(inputs, Choice()), Request(inputs, choice)]
    _, found = served.answer(requests, None)
    assert found.text == model.generate(
        {"images": picture(), "prompts": "caption en"},
        temperature=1.5,
        seed=seed,
        max_new_tokens=8,
    )


def test_a_stop_inside_of_another_ends_an_answer_in_any_company(model):
    """A longer answer beside it goes on for another chunk."""
    served = PresetModel(model, largest=4)

    def answer(*stops):
        choices = [Choice(temperature=1.0, seed=3, stop=stop) for stop in stops]
        inputs = served.read(PNG, "caption en", choices[0], Limits())
        requests = [Request(inputs, choice, True) for choice in choices]
        pieces = [""] * len(requests)

        def tell(row, text):
            pieces[row] += text
            return True

        found, *_ = served.answer(requests, tell)
        return found.text, pieces[0], found.tokens

    whole, _, tokens = answer(())
    stop = (whole, tokens[2])
    text, streamed, _ = answer(stop)
    assert text == streamed != ""
    assert answer(stop, ())[:2] == (text, streamed)


@pytest.mark.parametrize("leaves", [(), (0,), (0, 1)])
def test_a_stream_that_nobody_hears_ends(model, leaves):
    served = PresetModel(model, largest=4)
    choice = Choice(temperature=1.0, seed=3)
    inputs = served.read(PNG, "caption en", choice, Limits())
    told = [[], []]

    def tell(row, text):
        told[row].append(text)
        return row not in leaves

    served.answer([Request(inputs, choice, True)] * 2, tell)
    # While one is heard, both go on.
    assert [len(pieces) > 1 for pieces in told] == [len(leaves) < 2] * 2


def test_the_cache_may_be_int8(model):
    """Its rounding changes the numbers, by little."""
    numbers = []
    for cache_dtype in (None, "int8"):
        served = PresetModel(model, largest=1, cache_dtype=cache_dtype)
        inputs = served.read(PNG, "caption en", Choice(), Limits())
        (answer,) = served.answer([Request(inputs, Choice())], None)
        numbers.append(answer.log_probabilities[:2])
    assert numbers[0] != numbers[1]
    np.testing.assert_allclose(*numbers, rtol=0.05)


def test_its_width_tells_which_codec_its_masks_have(model):
    width = model.backbone.text_config.hidden_dim
    assert PresetModel(model).hidden_dim == width > 0


def test_little_is_compiled_before_the_server_is_ready(model):
    first, later = PresetModel(model, largest=8).warm_ups()
    assert [len(batch) for batch in first] == [1, 2, 4, 8]
    assert [len(batch) for batch in later] == [1, 8] * 3
    assert not any(
        batch[0].streams or batch[0].choice.temperature for batch in first
    )
    kinds = {(batch[0].streams, batch[0].choice.temperature) for batch in later}
    assert kinds == {(True, 0.0), (False, 1.0), (True, 1.0)}
    assert len(PresetModel(model, largest=1).warm_ups()[1]) == 3


def test_tokens_are_spelt_as_in_the_text(model):
    """PaliGemma's tokenizer keeps a space at the start of a text."""
    served = PresetModel(model, largest=1)
    tokenizer = model.preprocessor.tokenizer
    words = [tokenizer.token_to_id("\u2581cat"), tokenizer.end_token_id]
    text = tokenizer.detokenize(words[:1])
    choice = Choice(alternatives=1)
    inputs = served.read(PNG, "caption en", choice, Limits())
    found = Answer(
        text,
        tuple(words),
        (-0.5, -0.5),
        "stop_token",
        tuple((Alternative(word, "", -0.5),) for word in words),
    )
    answer = served._answered(Request(inputs, choice), found)
    assert "".join(answer.tokens) == answer.text == " cat"
    # The token that was chosen is among the likeliest.
    assert answer.alternatives == (((" cat", -0.5),), (("", -0.5),))
