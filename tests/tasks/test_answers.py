import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies

from keras_paligemma.tasks import answers
from keras_paligemma.tasks import scores
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.answers import write_object
from keras_paligemma.tasks.answers import write_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Object

BOX = "<loc0100><loc0200><loc0300><loc0400>"
WHOLE = "<loc0000><loc0000><loc1023><loc1023>"
MASK = "".join(f"<seg{7 * i:03d}>" for i in range(16))

# Parts of a model's answers, and invalid ones.
SOUP = (
    *("<loc0000>", "<loc0100>", "<loc0511>", "<loc1023>", "<loc1024>"),
    *("<loc1>", "<loc>", "<loc00000>", "<seg000>", "<seg127>", "<seg128>"),
    *("<seg>", MASK, BOX, WHOLE, " ", "  ", "\n", ";", " ; ", ";;"),
    *(" cat", " dog", "black", "<", ">", "loc0001", "<eos>", "猫", "é", "🙂"),
    *("\x00", "\\", "%", "{}", "nan", "-1", "0.5", "\ud800", "<loc٠٠٠١>"),
)


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(answers)
    assert result.attempted and not result.failed


def test_reads_what_models_answer():
    found = read_objects(f"{BOX} cat ; {WHOLE} black dog")
    assert [item.label for item in found] == ["cat", "black dog"]
    assert found[0].box == (100 / 1023, 200 / 1023, 300 / 1023, 400 / 1023)
    assert found[1].box == (0, 0, 1, 1) and not found.skipped
    assert found.answer == f"{BOX} cat ; {WHOLE} black dog"


@pytest.mark.parametrize(
    "text",
    [
        f"{BOX} cat;{WHOLE} dog",
        f"{BOX} cat {WHOLE} dog",
        f" ; {BOX}  cat  ;; {WHOLE}dog ; ",
        f"{BOX.replace('><', '> <')} cat ;\n{WHOLE} dog\n",
    ],
)
def test_separators_and_spaces_may_differ(text):
    found = read_objects(text)
    wanted = [(100 / 1023, "cat"), (0, "dog")]
    assert [(item.box[0], item.label) for item in found] == wanted
    assert not found.skipped


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a cat", "words without a box"),
        ("<loc0001><loc0002><loc0003> cat", "3 locations, not 4"),
        ("<loc0001> cat", "1 location, not 4"),
        (f"<loc0001>{BOX} cat", "5 locations, not 4"),
        (f"{BOX}{BOX} cat", "8 locations, not 4"),
        (f"{BOX[:-9]}<loc1024> cat", "a location that does not exist"),
        (f"{BOX[:-9]}<loc400> cat", "a location that does not exist"),
        (f"<loc>{BOX} cat", "5 locations, not 4"),
        (f"{BOX[:-9]}<loc0199> cat", "a box upside down"),
        ("<loc0301>" + BOX[9:], "a box upside down"),
        (f"{MASK} cat", "a mask without a box"),
    ],
)
def test_what_is_no_object_is_told(text, reason):
    found = read_objects(text)
    assert not found
    assert [(item.text, item.reason) for item in found.skipped] == [
        (text, reason)
    ]
    for around in (f"{text} ; {WHOLE} dog", f"{WHOLE} dog ; {text}"):
        found = read_objects(around)
        assert [item.label for item in found] == ["dog"]
        assert [item.reason for item in found.skipped] == [reason]


def test_nothing_is_neither_found_nor_skipped():
    for text in ("", " ", ";", " ; \n;", []):
        found = read_objects(text)
        assert not found and not found.skipped


def test_masks_are_decoded():
    codec = MaskCodec.embedded()
    found = read_objects(f"{BOX}{MASK} cat ; {WHOLE} dog ; {BOX}{MASK}", codec)
    assert [item.label for item in found] == ["cat", "dog", ""]
    wanted = codec.decode([[7 * i for i in range(16)]])[0]
    np.testing.assert_allclose(found[0].mask, wanted, atol=1e-5)
    assert found[1].mask is None and not found.skipped
    np.testing.assert_allclose(found[2].mask, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (MASK[:-8], "a mask of 15 codes, not 16"),
        (f"{MASK}<seg000>", "a mask of 17 codes, not 16"),
        (f"{MASK[:-8]}<seg128>", "a mask with a code that does not exist"),
        (f"{MASK[:-8]}<seg>", "a mask with a code that does not exist"),
    ],
)
def test_a_wrong_mask_leaves_the_box(codes, reason):
    found = read_objects(f"{BOX}{codes} cat", MaskCodec.embedded())
    assert found[0] == Object(read_objects(BOX)[0].box, "cat")
    assert [item.reason for item in found.skipped] == [reason]


def test_a_mask_without_a_codec_is_told():
    found = read_objects(f"{BOX}{MASK} cat")
    assert len(found) == 1 and found[0].mask is None
    assert found.skipped[0].reason == "a mask, and no codec to decode it"


def test_labels_that_were_not_asked_for_are_told():
    text = f"{BOX} cat ; {WHOLE} dog"
    for asked in ("dog", [" dog", "bird"]):
        found = read_objects(text, labels=asked)
        assert [item.label for item in found] == ["dog"]
        assert [item.text for item in found.skipped] == [f"{BOX} cat"]
    assert len(read_objects(text, labels=[])) == 0


def test_the_reading_by_1024():
    assert read_objects(WHOLE, scale=1024)[0].box == (0, 0, *[1023 / 1024] * 2)
    one = Object((0, 0.25, 0.5, 1))
    assert write_objects([one], scale=1024) == (
        "<loc0000><loc0256><loc0512><loc1023>"
    )


def test_what_is_written_is_read_again():
    random = np.random.default_rng(0)
    boxes = np.sort(random.random((2_000, 2, 2)), 1).reshape(-1, 4)
    labels = random.choice(["cat", "the dog, left", "猫"], len(boxes))
    written = [
        Object(tuple(box), str(label))
        for box, label in zip(boxes, labels, strict=True)
    ]
    text = write_objects(written)
    found = read_objects(text)
    assert not found.skipped and write_objects(found) == text
    assert [item.label for item in found] == labels.tolist()
    again = np.array([item.box for item in found])
    assert np.abs(again - boxes).max() <= 1 / 2046


def test_masks_are_written():
    codec = MaskCodec.embedded()
    mask = np.zeros((50, 70), bool)
    mask[10:40, 20:60] = True
    mask[10:20, 20:40] = False
    one = Object.from_mask(mask, label="cat")
    text = write_objects([one, one], codec)
    assert text.count("<seg") == 32 and text.count("<loc") == 8
    first, second = read_objects(text, codec)
    assert first.box == second.box and first.label == "cat"
    found = first.mask_in(mask.shape)
    assert (found & mask).sum() / (found | mask).sum() > 0.9
    with pytest.raises(ValueError, match="no mask to encode"):
        write_objects([Object((0, 0, 1, 1), "cat")], codec)
    empty = Object((0, 0, 1, 1), mask=np.full((3, 3), -1.0))
    with pytest.raises(ValueError, match="no mask to encode.*0 pixels"):
        write_objects([empty], codec)


def test_codes_are_those_of_one_mask():
    one, codes = Object((0, 0, 1, 1), "cat"), [7 * i for i in range(16)]
    for form in (list, np.array, iter):
        assert write_object(one, form(codes)) == f"{WHOLE}{MASK} cat"
    for wrong in ([], [128] * 16, [-1] * 16, [0.5] * 16, codes[:15], [codes]):
        with pytest.raises(ValueError, match="16 whole numbers of 0 to 127"):
            write_object(one, wrong)


def test_labels_that_could_not_be_read_again_are_refused():
    assert write_objects([]) == ""
    assert write_objects([Object((0, 0, 1, 1))]) == WHOLE
    with pytest.raises(ValueError, match="separates labels"):
        write_objects([Object((0, 0, 1, 1), "cat ; dog")])


def test_scores_come_from_the_tokens_of_the_object():
    """SentencePiece's tokens: a space belongs to the following word."""
    box = ["<loc0000>", "<loc0000>", "<loc1023>", "<loc1023>"]
    tokens = [*box, " black", " cat", " ;", " ", *box, *["<seg000>"] * 16]
    tokens += [" dog"]
    values = -np.arange(1.0, len(tokens) + 1) / 10
    seen = []

    def score(locations, label):
        seen.append((list(locations), list(label)))
        return 0.25

    found = read_objects(tokens, log_probabilities=values, score=score)
    assert [item.score for item in found] == [0.25, 0.25]
    assert seen == [
        (list(values[:4]), list(values[4:6])),
        (list(values[8:12]), list(values[-1:])),
    ]
    first, second = read_objects(tokens, log_probabilities=values)
    assert first.score == scores.box_and_label(*seen[0]) > second.score


def test_what_separates_objects_without_labels_is_not_in_their_scores():
    box = ["<loc0000>", "<loc0000>", "<loc1023>", "<loc1023>"]
    tokens = [*box, " ;", " ", *box, " ; ", *box]
    values = [-9.0 if ";" in token else -0.5 for token in tokens]
    found = read_objects(tokens, log_probabilities=values)
    wanted = scores.box_and_label([-0.5] * 4, [])
    assert [item.score for item in found] == [wanted] * 3


def test_scores_of_characters_that_several_tokens_make():
    box = ["<loc0000>", "<loc0000>", "<loc1023>", "<loc1023>"]
    tokens = [*box, " a", "猫", "", "", ";", *box, "猫", "", " "]
    seen = []
    read_objects(
        tokens,
        log_probabilities=-np.arange(float(len(tokens))),
        score=lambda locations, label: seen.append(list(label)) or 0.5,
    )
    assert seen == [[-4, -5, -6, -7], [-13, -14]]


@pytest.mark.parametrize(
    ("answer", "values", "message"),
    [
        (BOX, [0.0] * 36, "as a list"),
        ([BOX], [0.0, 0.0], "one log-probability a token"),
        ([BOX], [0.1], "0 or less"),
        ([BOX], [np.nan], "0 or less"),
    ],
)
def test_log_probabilities_that_do_not_fit_are_refused(answer, values, message):
    with pytest.raises(ValueError, match=message):
        read_objects(answer, log_probabilities=values)


def boxes_of(text):
    """Find the boxes of a text character by character."""
    boxes, run, i = [], [], 0
    while i <= len(text):
        end = text.find(">", i)
        name = text[i + 4 : end]
        if text.startswith("<loc", i) and end > 0 and is_word(name):
            run.append(name)
            i = end + 1
        elif run and text[i : i + 1].isspace():
            i += 1
        else:
            exist = [
                len(numbers) == 4 and int_or(numbers, 1024) < 1024
                for numbers in run
            ]
            if len(run) == 4 and all(exist):
                y1, x1, y2, x2 = map(int, run)
                if y1 <= y2 and x1 <= x2:
                    boxes.append((y1 / 1023, x1 / 1023, y2 / 1023, x2 / 1023))
            run = []
            i += 1
    return boxes


def is_word(name):
    return all(character.isalnum() or character == "_" for character in name)


def int_or(name, other):
    return int(name) if name.isascii() and name.isdigit() else other


def test_100_000_answers_of_token_soup():
    random = np.random.default_rng(0)
    lengths = random.integers(0, 10, 100_000)
    picks = random.integers(0, len(SOUP), lengths.sum())
    ends = np.cumsum(lengths)
    found = 0
    for start, end in zip(ends - lengths, ends, strict=True):
        text = "".join([SOUP[i] for i in picks[start:end]])
        objects = read_objects(text)
        assert [item.box for item in objects] == boxes_of(text), text
        assert all(item.label in text for item in objects)
        assert all(part.text in text for part in objects.skipped)
        found += len(objects)
    assert found > 10_000


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    strategies.one_of(
        strategies.text(),
        strategies.lists(strategies.sampled_from(SOUP)).map("".join),
        strategies.from_regex(r"(<(loc|seg)\d{0,5}>? ?)*[^;]{0,3};?"),
    )
)
def test_any_text_is_read(text):
    found = read_objects(text, MaskCodec.embedded())
    assert [item.box for item in found] == boxes_of(text)
    assert all(item.label in text for item in found)
    # Nothing is lost: text outside of objects is reported.
    told = sum(len(part.text) for part in found.skipped)
    said = sum(
        4 * 9 + 16 * 8 * (item.mask is not None) + len(item.label)
        for item in found
    )
    assert len("".join(text.split()).replace(";", "")) <= told + said
