"""Answers that cannot be but what is allowed."""

import re

import numpy as np
import pytest
from keras import ops

from keras_paligemma.generation.automata import Automaton
from keras_paligemma.generation.automata import objects_of


@pytest.fixture(scope="module")
def model(tiny_model):
    """A random model: nothing that it says is right by itself."""
    return tiny_model()


OBJECT = r"(<loc\d{4}>){4}((<seg\d{3}>){16})? (traffic light|cat)"


def test_answers_are_choices(model, examples):
    asked = {key: examples[key] for key in ("images", "prompts")}
    choices = ["yes", "no", "yes please", "an owl"]
    found = model.generate(asked, choices=choices)
    assert set(found) <= set(choices)
    # The likeliest of them, token by token: with beams the likeliest of all.
    best = model.generate(asked, choices=choices, beams=4)
    repeated = {
        key: [item for item in value for _ in choices]
        for key, value in asked.items()
    }
    scores = model.score(repeated | {"responses": choices * 4})
    assert best == [choices[i] for i in scores.reshape(4, 4).argmax(axis=1)]


@pytest.mark.parametrize("drawn", [{}, {"temperature": 3.0, "seed": 0}])
def test_answers_are_legal_objects(model, examples, drawn):
    prompts = [
        "detect cat ; traffic light",
        "segment cat",
        "caption en",
        "detect cat",
    ]
    asked = {"images": examples["images"], "prompts": prompts}
    found = model.generate(asked, 60, legal_objects=True, details=True, **drawn)
    free = model.generate(asked, 60, details=True, **drawn)
    for row in (0, 1, 3):
        text = found[row].text
        assert text != free[row].text
        assert found[row].finish == "stop_token"
        assert re.fullmatch(rf"({OBJECT}( ; {OBJECT})*)?", text)
        assert ("<seg" in text) == (row == 1 and text != "")
    assert found[2] == free[2]


def test_objects_that_do_not_fit_do_not_begin(model, examples):
    """The model would never stop by itself: what is left decides."""
    tokenizer = model.preprocessor.tokenizer
    asked = {"images": examples["images"][0], "prompts": "detect cat"}
    options = {"legal_objects": True, "details": True}
    one, two = (
        len(tokenizer.tokenize(" ; ".join(["<loc0000>" * 4 + " cat"] * count)))
        for count in (1, 2)
    )

    def on_and_on(logits_BV, state):
        ids_V = ops.arange(logits_BV.shape[1], dtype="int32")
        return ops.where(ids_V == 1, -1e9, logits_BV)

    for length, objects in (
        (1, 0),
        (one, 0),
        (one + 1, 1),
        (two, 1),
        (two + 1, 2),
    ):
        answer = model.generate(asked, length, logits_hook=on_and_on, **options)
        assert answer.finish == "stop_token"
        assert answer.text.count(" cat") == objects
        assert re.fullmatch(rf"({OBJECT}( ; {OBJECT})*)?", answer.text)
    best = model.generate(asked, two, beams=3, **options)
    assert best.finish == "stop_token"
    # A begun object that cannot end is cut.
    begun = asked | {"responses": "<loc0001>" * 4}
    answer = model.generate(begun, 5, **options)
    assert answer.finish == "length"


def test_least_numbers_of_tokens_to_an_end():
    automaton = Automaton(16)
    start = automaton.add_node()
    automaton.add_path(start, [(1,), (2,), (3,)])
    middle = automaton.add_path(start, [(4,)])
    automaton.add_path(middle, [(5,)], end=start)
    free = automaton.add_free_node()
    ends_in = automaton.arrays()["ends_in"]
    assert ends_in[: free + 1].tolist() == [3, 2, 1, 0, 4, 0]


def walk(automaton, node, tokens):
    arrays = automaton.arrays()
    for token in tokens:
        node = arrays["next_nodes"][node, arrays["token_classes"][token]]
        if node < 0:
            return False
    return True


@pytest.mark.parametrize(
    ("answer", "legal"),
    [
        ("", True),
        ("<loc0001><loc0002><loc0003><loc0004> cat", True),
        ("<loc0001><loc0002><loc0003><loc0004> traffic light", True),
        (" ; ".join(["<loc0001><loc0002><loc0003><loc0004> cat"] * 3), True),
        ("<loc0001><loc0002><loc0003> cat", False),
        ("<loc0001><loc0002><loc0003><loc0004> dog", False),
        ("<loc0001><loc0002><loc0003><loc0004> cat ;", False),
        ("cat", False),
    ],
)
def test_what_is_legal(model, answer, legal):
    tokenizer = model.preprocessor.tokenizer
    automaton = Automaton(2048)
    prompt = "detect traffic light ; cat"
    start = objects_of(automaton, prompt, tokenizer, (1,))
    tokens = [*tokenizer.tokenize(answer), 1]
    assert walk(automaton, start, tokens) == legal
    assert walk(automaton, automaton.add_free_node(), np.arange(50))


def test_constraints_that_cannot_be(model, examples):
    asked = {key: examples[key] for key in ("images", "prompts")}
    for options, message in (
        ({"choices": []}, "`choices` is empty"),
        ({"choices": "yes"}, "`choices`.*Received: 'yes'"),
        ({"choices": ["a"], "legal_objects": True}, "exclude each other"),
        ({"choices": ["a"], "stop_token_ids": None}, "ends by a stop token"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(asked, **options)
