"""Streamed text, and stop texts."""

import numpy as np
import pytest

from keras_paligemma.generation.requests import bucket
from keras_paligemma.generation.texts import cut
from keras_paligemma.generation.texts import settled


@pytest.fixture(scope="module")
def nano():
    from keras_paligemma import PaliGemmaCausalLM

    return PaliGemmaCausalLM.from_preset("pali_gemma2_nano_112")


@pytest.fixture
def asked(examples):
    prompts = ["caption en", "detect cat", "answer en how many dog?", "ocr"]
    return {"images": examples["images"], "prompts": prompts}


def test_pieces_are_the_answers(nano, asked):
    wanted = nano.generate(asked, max_new_tokens=12)
    pieces = list(nano.stream(asked, max_new_tokens=12, chunk=3))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == wanted
    assert len(pieces) > 2
    one = {key: value[0] for key, value in asked.items()}
    pieces = list(nano.stream(one, max_new_tokens=12, chunk=3))
    assert all(isinstance(piece, str) for piece in pieces)
    assert "".join(pieces) == wanted[0]


def test_arrays_of_a_user_are_not_overwritten(nano, asked):
    """A full bucket is passed on as it is, and chunks overwrite their state."""
    arrays = nano.preprocessor.generate_preprocess(asked)
    assert len(arrays["token_ids"]) == bucket(len(arrays["token_ids"]))
    before = {name: np.array(array) for name, array in arrays.items()}
    list(nano.stream(arrays, max_new_tokens=12, chunk=3))
    nano.generate(arrays, max_new_tokens=12)
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_who_does_not_stream_has_one_program(nano, asked):
    programs = nano.make_generate_function()
    # Twice, since Torch records in the second run.
    for _ in range(2):
        nano.generate(asked, max_new_tokens=12)
    before = programs.compilations()
    for _ in range(2):
        list(nano.stream(asked, max_new_tokens=12, chunk=3))
    compiled = programs.compilations()
    list(nano.stream(asked, max_new_tokens=7, chunk=2))
    assert programs.compilations() == compiled
    assert compiled <= before + 2


def test_stop_strings_end_answers(nano, asked):
    wanted = nano.generate(asked, max_new_tokens=12, details=True)
    stop = wanted[0].text[5:8]
    found = nano.generate(
        asked, max_new_tokens=12, stop_strings=stop, details=True
    )
    for result, whole in zip(found, wanted, strict=True):
        assert result.text == cut(whole.text, (stop,))
        size = len(result.token_ids)
        assert result.token_ids == whole.token_ids[:size]
        if result.text == whole.text:
            assert result.finish == whole.finish
        else:
            assert result.finish == "stop_string" and size < len(
                whole.token_ids
            )
    pieces = list(nano.stream(asked, max_new_tokens=12, stop_strings=[stop]))
    texts = ["".join(row) for row in zip(*pieces, strict=True)]
    assert texts == [result.text for result in found]


def test_a_stop_string_in_the_given_start_ends_nothing(nano, asked):
    asked["prompts"][-1] = "caption en"
    start, stops = "a, a bicycle", (" bicycle", ", a")
    asked["responses"] = [start, start, "a", "a lion,"]
    wanted = nano.generate(asked, max_new_tokens=12)
    options = {"max_new_tokens": 12, "stop_strings": stops}
    found = nano.generate(asked, details=True, **options)
    given = [len(text) for text in asked["responses"]]
    texts = [
        cut(text, stops, length)
        for text, length in zip(wanted, given, strict=True)
    ]
    assert [result.text for result in found] == texts
    assert texts[0].startswith(start) and texts[0] != wanted[0]
    # The last stop string is completed by the first new token.
    assert texts[-1] == "a lion" and len(wanted[-1]) > 7
    for result, text in zip(found, wanted, strict=True):
        assert (result.finish == "stop_string") == (result.text != text)
    pieces = list(nano.stream(asked, chunk=3, **options))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts


def test_the_token_that_ends_an_answer_is_not_in_its_text(nano, asked):
    whole = nano.generate(asked, max_new_tokens=12, details=True)[0]
    stops = [whole.token_ids[3], 1]
    options = {"max_new_tokens": 12, "stop_token_ids": stops}
    found = nano.generate(asked, details=True, **options)
    count = len(found[0].token_ids)
    assert found[0].token_ids == whole.token_ids[:count]
    assert found[0].finish == "stop_token" and found[0].token_ids[-1] != 1
    tokenizer = nano.preprocessor.tokenizer
    texts = [
        tokenizer.detokenize(list(result.token_ids[:-1]))
        if result.finish == "stop_token"
        else result.text
        for result in found
    ]
    assert [result.text for result in found] == texts
    pieces = list(nano.stream(asked, chunk=3, **options))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == texts


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("a cat", (), "a cat"),
        ("a cat\ufffd", (), "a cat"),
        ("one.", (".\n",), "one"),
        ("one.\ntwo", (".\n",), "one"),
        ("abab", ("abc",), "ab"),
        ("abab", ("bx", "abc", "bxy"), "ab"),
        # The stop string that may have begun is not the incomplete character.
        ("one.\ufffd", (".\n",), "one"),
    ],
)
def test_what_is_settled(text, stops, wanted):
    assert settled(text, stops) == wanted


def test_what_was_given_ends_nothing():
    text, stops = "a, b, ", (", ",)
    found = [cut(text, stops, given) for given in (0, 2, 3, 5, 6)]
    assert found == ["a", "a", "a, b", "a, b", text]
    assert settled("a, ", stops, given=2) == "a"
    assert settled("a, ", stops, given=3) == "a, "
    assert settled("a, b,", stops, given=3) == "a, b"


@pytest.mark.parametrize(
    ("stops", "wanted"), [(("xyz", "y"), "-x"), (("yz", "z", "xyz"), "-")]
)
def test_what_is_cut_stays_cut_while_the_text_grows(stops, wanted):
    """The first complete stop string ends a text; of several, the longest."""
    found = [cut("-xyz-"[:length], stops) for length in range(6)]
    ended = found.index(wanted, 3)
    assert set(found[ended:]) == {wanted}


def test_streams_that_cannot_be(nano, asked):
    with pytest.raises(ValueError, match="`chunk`.*Received: 0"):
        nano.stream(asked, chunk=0)
    with pytest.raises(ValueError, match="one answer a prompt.*beams"):
        nano.stream(asked, beams=2)
    with pytest.raises(ValueError, match="one of them without beams"):
        nano.generate(asked, beams=2, stop_strings=["."])


def test_streams_of_a_sampler_with_a_generator(tiny_model, examples):
    import keras_hub

    model = tiny_model()
    asked = {key: examples[key] for key in ("images", "prompts")}
    samplers = [
        keras_hub.samplers.RandomSampler(temperature=3.0, seed=4)
        for _ in range(2)
    ]
    model.compile(sampler=samplers[0])
    wanted = [model.generate(asked) for _ in range(2)]
    model.compile(sampler=samplers[1])
    for answers in wanted:
        pieces = list(model.stream(asked, chunk=3))
        assert ["".join(row) for row in zip(*pieces, strict=True)] == answers
