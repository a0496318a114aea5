"""Prompt and response: splitting, joining and realigning."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from keras_paligemma.data.batches import in_parts
from keras_paligemma.preprocessing.layout import pack
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.preprocessing.realigning import realign

PROMPTS = [[2, 7, 5], [2, 7, 8, 9, 5]]
RESPONSES = [[11, 12, 1], [13, 1]]


def packed_to_the_left(length=9):
    """Return arrays in the layout of the original and of KerasHub."""
    shape = (len(PROMPTS), length)
    ids = np.zeros(shape, "int32")
    valid, response = np.zeros((2, *shape), bool)
    for row, texts in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        start, end = len(texts[0]), len(texts[0] + texts[1])
        ids[row, :end] = texts[0] + texts[1]
        valid[row, :end] = True
        response[row, start:end] = True
    return {"token_ids": ids, "padding_mask": valid, "response_mask": response}


def test_cut_and_whole_are_inverse():
    arrays = pack(PROMPTS, RESPONSES, 6, 4, pad=0)
    text = PromptAndResponse.cut(arrays, 4)
    assert text.response_length == 4
    assert text.prompt_ids.tolist()[0] == [0, 0, 0, 2, 7, 5]
    assert text.response_ids.tolist() == [[11, 12, 1, 0], [13, 1, 0, 0]]
    again = PromptAndResponse.among(text.arrays())
    for field in dataclasses.fields(text):
        np.testing.assert_array_equal(
            getattr(again, field.name), getattr(text, field.name)
        )
    assert PromptAndResponse.among(arrays) is None
    for name, array in text.whole().items():
        np.testing.assert_array_equal(ops.convert_to_numpy(array), arrays[name])


def test_the_states_before_the_response_predict_it():
    text = PromptAndResponse.cut(pack(PROMPTS, RESPONSES, 6, 4, pad=0), 4)
    hidden_BLD = np.arange(13)[None, :, None]  # Three image tokens.
    assert text.predicting(hidden_BLD).ravel().tolist() == [8, 9, 10, 11]


def test_without_a_response_mask_valid_tokens_are_response():
    arrays = pack(PROMPTS, RESPONSES, 6, 4, pad=0)
    mask = arrays.pop("response_mask")
    text = PromptAndResponse.cut(arrays, 4)
    np.testing.assert_array_equal(text.response_mask, mask[:, -4:])


def test_texts_packed_to_the_left_are_laid_out_anew():
    arrays = packed_to_the_left()
    targets = arrays["token_ids"][:, 1:]
    weights = 0.5 * arrays["response_mask"][:, 1:]
    x, y, given = in_parts(arrays | {"images": "kept"}, targets, weights)
    wanted = PromptAndResponse.cut(pack(PROMPTS, RESPONSES, 9, 9, pad=0), 9)
    assert x.pop("images") == "kept"
    for name, array in wanted.arrays().items():
        np.testing.assert_array_equal(x[name], array)
    np.testing.assert_array_equal(y, wanted.response_ids)
    np.testing.assert_array_equal(given, 0.5 * wanted.response_mask)


def test_what_lies_as_it_should_is_not_copied():
    arrays = pack(PROMPTS, RESPONSES, 6, 4, pad=0)
    x, y, weights = in_parts(arrays, arrays["token_ids"][:, -4:])
    assert x["prompt_ids"].base is arrays["token_ids"]
    assert weights is None


def test_targets_count_where_responses_are():
    arrays = packed_to_the_left()
    _, targets, weights = realign(arrays, arrays["token_ids"][:, 4:], None)
    # The first token of the first response is not a target.
    assert targets[0, :4].tolist() == [0, 12, 1, 0]
    assert weights[0, :4].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a prompt behind the response", "followed by one response.*row 0"),
        ("weights on a prompt", "cannot be learned.*row 1"),
        ("positions of its own", "of your own"),
    ],
)
def test_layouts_without_a_meaning_are_refused(change, message):
    arrays = packed_to_the_left()
    if change == "a prompt behind the response":
        arrays["response_mask"][0, 4] = False
    if change == "positions of its own":
        arrays["positions"] = np.arange(9)[None]
    weights = arrays["response_mask"][:, 1:].astype("float32")
    if change == "weights on a prompt":
        weights[1, 2] = 1
    with pytest.raises(ValueError, match=message):
        in_parts(arrays, arrays["token_ids"][:, 1:], weights)
