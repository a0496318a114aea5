"""Answers that are restricted to allowed texts."""

import re
import sys

import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.generation.automata import NEVER
from keras_paligemma.generation.automata import Automaton
from keras_paligemma.generation.automata import node_after
from keras_paligemma.generation.automata import objects_of
from keras_paligemma.generation.automata import one_of
from keras_paligemma.generation.constraints import legal
from keras_paligemma.generation.patterns import matches_of


@pytest.fixture(scope="module")
def model(tiny_model):
    """Return a random model, which gives no correct answer by itself."""
    return tiny_model()


OBJECT = r"(<loc\d{4}>){4}((<seg\d{3}>){16})? (traffic light|cat)"


def test_answers_are_choices(model, examples):
    asked = {key: examples[key] for key in ("images", "prompts")}
    choices = ["yes", "no", "yes please", "an owl"]
    found = model.generate(asked, choices=choices)
    assert set(found) <= set(choices)
    # Without beams the choice is greedy. With beams it is the most probable
    # choice.
    best = model.generate(asked, choices=choices, beams=4)
    repeated = {
        key: [item for item in value for _ in choices]
        for key, value in asked.items()
    }
    scores = model.score(repeated | {"responses": choices * 4})
    assert best == [choices[i] for i in scores.reshape(4, 4).argmax(axis=1)]
    newline = model.preprocessor.tokenizer.tokenize("\n")
    found = model.generate(asked, choices=choices, stop_token_ids=newline)
    assert set(found) <= set(choices)


def test_what_is_banned_is_no_way_through_a_constraint(model, examples):
    tokenizer = model.preprocessor.tokenizer
    asked = {key: examples[key] for key in ("images", "prompts")}
    choices = ["yes", "yes please", "no"]
    *_, yes = tokenizer.tokenize("yes")
    # Tensors of the backend, and whole floats, are ids too.
    for given in ([yes], [float(yes)], ops.convert_to_tensor([yes], "int32")):
        found = model.generate(asked, choices=choices, banned_token_ids=given)
        assert set(found) == {"no"}
    banned = [i for text in choices for i in tokenizer.tokenize(text)]
    with pytest.raises(ValueError, match="Prompt 0 has no answer.*banned"):
        model.generate(asked, choices=choices, banned_token_ids=banned)


def test_a_constraint_that_no_answer_can_meet_is_refused(model, examples):
    asked = {key: examples[key] for key in ("images", "prompts")}
    begun = asked | {"responses": ["", "yes", "owl", ""]}
    with pytest.raises(ValueError, match="Prompt 2 .*begun answer 'owl'"):
        model.generate(begun, choices=["yes please", "no"])
    long = "yes please, an owl"
    with pytest.raises(ValueError, match="room for 2 tokens.*answer has"):
        model.generate(asked, 2, choices=[long])
    no = model.preprocessor.tokenizer.tokenize("no")[0]
    for stops in ([1, no], [no]):
        with pytest.raises(ValueError, match="stop token is also a part"):
            model.generate(asked, choices=["no"], stop_token_ids=stops)


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


@pytest.mark.parametrize("drawn", [{}, {"temperature": 3.0, "seed": 0}])
@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{2,4}",
        r"(two|three) (cats|dogs)( and an? [a-z]+)?",
        r"(<loc[0-9]{4}>){4} (cat|dog)",
        # Letters that the vocabulary may spell byte by byte.
        r"(größe|大きさ)!",
    ],
)
def test_answers_match_a_pattern(model, examples, pattern, drawn):
    pytest.importorskip("outlines_core")
    asked = {key: examples[key] for key in ("images", "prompts")}
    found = model.generate(asked, 16, regex=pattern, details=True, **drawn)
    for answer in found:
        assert re.fullmatch(pattern, answer.text)
        assert answer.finish == "stop_token"
    best = model.generate(asked, 16, regex=pattern, beams=2)
    assert all(re.fullmatch(pattern, text) for text in best)


def test_a_pattern_ends_in_time(model, examples):
    pytest.importorskip("outlines_core")
    asked = {"images": examples["images"][0], "prompts": "answer en what?"}
    options = {"regex": "[a-z ]+[.]", "details": True, "temperature": 3.0}
    for seed in range(4):
        found = model.generate(asked, 4, seed=seed, **options)
        assert re.fullmatch(options["regex"], found.text)
        assert len(found.token_ids) <= 4


def test_bad_patterns_are_refused(model, examples):
    pytest.importorskip("outlines_core")
    asked = {key: examples[key] for key in ("images", "prompts")}
    for pattern in ("(a", "a)|(b", "(?=a)b", r"(a)\1"):
        with pytest.raises(ValueError, match="without look-around") as error:
            model.generate(asked, regex=pattern)
        assert repr(pattern) in str(error.value)
    for pattern in ("", 3, ["a"]):
        with pytest.raises(ValueError, match="a pattern that is not empty"):
            model.generate(asked, regex=pattern)
    with pytest.raises(ValueError, match="Constraints exclude each other"):
        model.generate(asked, regex="a", choices=["a"])
    with pytest.raises(ValueError, match="ends by a stop token"):
        model.generate(asked, regex="a", stop_token_ids=None)


def test_an_extra_that_is_missing_is_named(model, examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    asked = {key: examples[key] for key in ("images", "prompts")}
    with pytest.raises(ImportError, match=r"keras_paligemma\[regex\]"):
        model.generate(asked, regex="never compiled before")


def test_objects_that_do_not_fit_do_not_begin(model, examples):
    """The model never stops by itself, so the remaining length decides."""
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
    # A begun object that cannot be completed is cut.
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


@pytest.mark.parametrize(
    ("banned", "allowed", "ends_in"),
    [
        ((), [1, 2], 2),
        ((1,), [2], 2),
        ((1, 2), [], NEVER),
        ((3,), [1, 2], NEVER),
    ],
)
def test_banned_tokens_leave_the_others_of_their_set(banned, allowed, ends_in):
    automaton = Automaton(8)
    start = automaton.add_node()
    automaton.add_path(start, [(1, 2), (3,)])
    free = automaton.add_free_node()
    arrays = automaton.arrays(banned)
    after = arrays["next_nodes"][:, arrays["token_classes"]]
    assert np.flatnonzero(after[start] >= 0).tolist() == allowed
    assert arrays["ends_in"][start] == ends_in
    assert (after[free] == free).all()


def test_each_row_has_its_own_time_to_an_end():
    automaton = Automaton(8)
    start = automaton.add_node()
    automaton.add_path(start, [(1,), (2,), (3,)])
    automaton.add_path(start, [(4,)])
    shared = {
        name: ops.convert_to_tensor(values)
        for name, values in automaton.arrays().items()
    }
    node_B = ops.full((3,), start, "int32")
    left_B = ops.convert_to_tensor([3, 1, 0], "int32")
    legal_BV = ops.convert_to_numpy(legal(shared, node_B, left_B))
    # The last row has no time for any end, so that it may be cut anywhere.
    assert [np.flatnonzero(row).tolist() for row in legal_BV] == [
        *([1, 4], [4], [1, 4]),
    ]


def test_sets_of_tokens_that_overlap_are_refused():
    automaton = Automaton(8)
    start = automaton.add_node()
    automaton.add_path(start, [(1, 2)])
    automaton.add_path(start, [(2,)])
    with pytest.raises(ValueError, match=r"overlap.*the tokens \[2\]"):
        automaton.arrays()


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


@pytest.mark.parametrize(
    ("pattern", "answers", "others"),
    [
        (r"[0-9]+(\.[0-9]+)?", ["12", "12.5"], ["12.", ".5", ""]),
        ("cat|cats|cat and dog", ["cat", "cats", "cat and dog"], ["cat and"]),
        ("yes(?: please)??", ["yes", "yes please"], ["yes "]),
        # Bytes of characters that are no tokens, behind what may be the end.
        (r"\w+", ["größe", "大きさ"], ["", "a b"]),
        (r".*", ["", "🙂!", "a <b"], ["a\nb"]),
        (r"\n?(a|)", ["", "\n", "\na", "a"], ["\n\n", "aa"]),
        (r"a$", ["a"], ["", "a\n"]),
    ],
)
def test_the_whole_answer_is_any_match(model, pattern, answers, others):
    pytest.importorskip("outlines_core")
    tokenizer = model.preprocessor.tokenizer
    automaton = Automaton(2048)
    start = matches_of(automaton, pattern, tokenizer, (1,))
    for text in (*answers, *others):
        tokens = [*tokenizer.tokenize(text), 1]
        assert walk(automaton, start, tokens) == (text in answers), text


def test_a_label_is_no_empty_text(model):
    tokenizer = model.preprocessor.tokenizer
    automaton = Automaton(2048)
    start = objects_of(automaton, "detect cat ;", tokenizer, (1,))
    place = tokenizer.tokenize("<loc0001>" * 4)
    assert walk(automaton, start, [*place, *tokenizer.tokenize(" cat"), 1])
    assert not walk(automaton, start, [*place, *tokenizer.tokenize(" "), 1])
    assert not walk(automaton, start, [*place, 1])
    free = objects_of(automaton, "detect ;", tokenizer, (1,))
    assert walk(automaton, free, tokenizer.tokenize("cat"))


def test_what_a_tokenizer_adds_is_no_part_of_an_answer(model):
    plain = model.preprocessor.tokenizer
    adding = PaliGemmaTokenizer(plain.proto, add_bos=True, add_eos=True)
    for text, make, asked in (
        ("yes", one_of, ["yes", "no"]),
        ("<loc0001>" * 4 + " cat", objects_of, "detect cat"),
    ):
        automaton = Automaton(2048)
        start = make(automaton, asked, adding, (1,))
        arrays = automaton.arrays(stops=(1,))
        end = node_after(arrays, start, [*plain.tokenize(text), 1])
        assert end >= 0 and arrays["ends_in"][end] == 0


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
