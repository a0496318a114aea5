"""One call per task: the prompts, and the parsed answers."""

import math

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.texts import texts_of
from keras_paligemma.tasks import published_codecs
from keras_paligemma.tasks import scores
from keras_paligemma.tasks.mask_codec import MaskCodec
from tests.helpers.text_models import build_tiny_model

WHOLE = "<loc0000><loc0000><loc1023><loc1023>"
HALF = "<loc0000><loc0000><loc1023><loc0512>"
MASK = "".join(f"<seg{7 * i:03d}>" for i in range(16))
PICTURE = np.full((20, 30, 3), 200, "uint8")


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture
def says(model, monkeypatch):
    """Return a function that sets the model's answers, call by call."""
    asked = []

    def says(*calls):
        calls = iter(calls)

        def generate(inputs, **options):
            asked.append(inputs | options)
            answers = next(calls)
            one = isinstance(inputs["prompts"], str)
            return answers if one else list(answers)

        monkeypatch.setattr(
            type(model),
            "generate",
            lambda self, inputs, **options: generate(inputs, **options),
        )
        return asked

    return says


def test_text(model, says):
    asked = says("a", ["b", "c"], "d", ["e", "f"], ["g", "h"], ["i"])
    assert model.caption(PICTURE, "fr", max_new_tokens=3) == "a"
    assert asked[-1]["prompts"] == "caption fr"
    assert asked[-1]["max_new_tokens"] == 3
    assert model.ocr([PICTURE, PICTURE]) == ["b", "c"]
    assert asked[-1]["prompts"] == ["ocr", "ocr"]
    assert model.ask(PICTURE, "why?") == "d"
    assert asked[-1]["prompts"] == "answer en why?"
    assert model.ask(PICTURE, ["why?", "how?"]) == ["e", "f"]
    assert len(asked[-1]["images"]) == 2
    assert model.ask(np.stack([PICTURE] * 2), "why?") == ["g", "h"]
    assert asked[-1]["prompts"] == ["answer en why?"] * 2
    assert model.ask([PICTURE], ["why?"]) == ["i"]
    with pytest.raises(ValueError, match="no such language.*'xx'"):
        model.caption(PICTURE, "xx")


@pytest.fixture
def answers(model, monkeypatch):
    """Return a function that sets answers and their token probabilities."""
    asked = []

    def answer(text, probability):
        ids = model.preprocessor.tokenizer.tokenize(text)
        values = [math.log(probability)] * len(ids)
        # If the stop token counted, every score would be small.
        return Answer(text, (*ids, 1), (*values, -50.0), "stop_token")

    def answers(*rows):
        made = [
            [answer(*item) for item in row]
            if isinstance(row, list)
            else answer(*row)
            for row in rows
        ]

        def generate(self, inputs, details, **options):
            assert details and len(inputs["prompts"]) == len(made)
            asked.append(inputs | options)
            return made

        monkeypatch.setattr(type(model), "generate", generate)
        return asked

    return answers


def test_scores_of_what_was_asked_for(model, answers):
    asked = answers((f"{WHOLE} cat ; {HALF} dog", 0.5), (f"{HALF} owl", 0.5))
    found = model.detect([PICTURE, PICTURE], ["cat", "dog"], batch_size=1)
    assert asked[0]["batch_size"] == 1
    assert asked[0]["prompts"] == ["detect cat ; dog"] * 2
    assert [[item.label for item in some] for some in found] == [
        ["cat", "dog"],
        [],
    ]
    assert found[1].skipped[0].reason == "a label that was not asked for"
    assert [item.score for item in found[0]] == pytest.approx([0.25, 0.25])
    answers((f"{WHOLE} cat", 0.5))
    (one,) = model.detect(PICTURE, "cat", score=scores.joint_probability)
    assert one.score == pytest.approx(0.5**5)
    answers(("", 1))
    assert len(model.detect(PICTURE, "cat")) == 0


def test_a_stop_string_is_not_read_for_objects(model, monkeypatch):
    ids = model.preprocessor.tokenizer.tokenize(f"{WHOLE} cat ; {HALF} dog")
    values = [math.log(0.5)] * len(ids)
    text = f"{WHOLE} cat ; {HALF[:-9]}"

    def generate(self, inputs, strip_prompt=True, **options):
        prompt = "" if strip_prompt else f"{inputs['prompts'][0]}\n"
        return [Answer(prompt + text, (*ids,), (*values,), "stop_string")]

    monkeypatch.setattr(type(model), "generate", generate)
    how = {"stop_strings": "<loc0512> dog", "strip_prompt": False}
    found = model.detect(PICTURE, ["cat", "dog"], **how)
    assert [item.label for item in found] == ["cat"] and found.answer == text
    assert found[0].score == pytest.approx(0.25)
    assert [part.reason for part in found.skipped] == ["3 locations, not 4"]


def test_alternatives_add_neighbouring_locations(model):
    """In a real model, scores are higher and everything else is the same."""
    begin = {"max_new_tokens": 8, "legal_objects": True}
    every = model.backbone.vocabulary_size
    prompt = {"images": PICTURE, "prompts": "detect cat"}
    (plain,) = model.detect(PICTURE, "cat", **begin)
    (shared,) = model.detect(PICTURE, "cat", alternatives=every, **begin)
    assert shared.box == plain.box
    answer = model.generate(prompt, details=True, alternatives=every, **begin)
    right = []
    for place in range(4):
        chosen = answer.token_ids[place]
        right.append(
            sum(
                math.exp(other.log_probability)
                for other in answer.alternatives[place]
                if other.text.startswith("<loc")
                and abs(other.token_id - chosen) <= 10
            )
        )
    texts = {other.text for other in answer.alternatives[0]}
    assert " cat" in texts and not any("\u2581" in text for text in texts)
    label = answer.log_probabilities[4:-1]
    box = math.prod(right) ** (1 / 4)
    wanted = box * math.exp(sum(label) / max(len(label), 1))
    assert shared.score == pytest.approx(wanted, rel=1e-5)
    assert shared.score > plain.score


def test_one_label_a_prompt(model, answers):
    cat, dog, none = (f"{HALF} cat", 0.5), (f"{WHOLE} dog", 0.25), ("", 1)
    asked = answers(cat, none, none, dog)
    one, two = model.detect([PICTURE] * 2, ["cat", "dog"], one_by_one=True)
    assert asked[0]["prompts"] == ["detect cat", "detect dog"] * 2
    assert [x.label for x in one] == ["cat"] and one.answer == f"{HALF} cat"
    assert [x.label for x in two] == ["dog"]
    asked = answers(cat, dog)
    found = model.detect([PICTURE] * 2, [["cat"], ["dog", "owl"]])
    assert asked[-1]["prompts"] == ["detect cat", "detect dog ; owl"]
    assert [len(some) for some in found] == [1, 1]
    with pytest.raises(ValueError, match="one a picture, 1. Received: 2"):
        model.detect(PICTURE, [["cat"], ["dog"]])
    with pytest.raises(ValueError, match="nothing to look for"):
        model.detect(PICTURE, [])


def test_an_object_without_a_label_has_the_one_that_was_asked_for(
    model, answers
):
    answers((WHOLE, 0.5))
    (found,) = model.detect(PICTURE, " the left cat ")
    assert found.label == "the left cat" and found.box == (0, 0, 1, 1)
    assert found.score == pytest.approx(0.5)


def test_samples_are_merged_on_request(model, answers):
    texts = [(f"{WHOLE} cat", 0.25), (f"{WHOLE} cat", 0.5)]
    answers([*texts, (f"{HALF} cat", 0.75)])
    (found,) = model.detect(PICTURE, "cat", num_samples=3)
    assert found.score == pytest.approx(0.75**2)
    found = model.detect(PICTURE, "cat", num_samples=3, overlap=0.6)
    assert [item.score for item in found] == pytest.approx([0.75**2, 0.25])
    (found,) = model.detect(PICTURE, "cat", num_samples=3, overlap=0.4)
    assert found.score == pytest.approx(0.75**2)


def test_beams_and_samples_of_the_model_itself(model):
    """Random weights detect nothing, but the options reach `generate`."""
    some = {"max_new_tokens": 3, "overlap": 0.5}
    inputs = {"images": [PICTURE], "prompts": ["detect cat"]}
    (wanted,) = model.generate(inputs, 3, beams=2, details=True)
    found = model.detect(PICTURE, "cat", beams=2, **some)
    texts = [beam.text for beam in wanted.beams if beam.text]
    assert found.answer == " ; ".join(texts)
    options = {"num_samples": 2, "temperature": 1.0, "seed": 0}
    (drawn,) = model.generate(inputs, 3, **options)
    found = model.detect(PICTURE, "cat", **options, **some)
    assert found.answer == " ; ".join(text for text in drawn if text)


def test_masks(model, answers):
    asked = answers((f"{HALF}{MASK} cat", 0.5))
    (found,) = model.segment(PICTURE, "cat")
    assert asked[0]["prompts"] == ["segment cat"]
    codes = [[7 * i for i in range(16)]]
    wanted = MaskCodec.embedded().decode(codes)[0]
    np.testing.assert_array_equal(found.mask, wanted)
    assert found.mask_in((20, 30)).shape == (20, 30)
    (found,) = model.segment([PICTURE], ["cat"], MaskCodec.embedded())[0]
    np.testing.assert_array_equal(found.mask, wanted)


def test_a_notebook_shows_the_picture(model, answers):
    answers((f"{HALF} cat", 0.5))
    png = model.detect(PICTURE, "cat")._repr_png_()
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text", [f"{WHOLE} cat", "", "猫 é\n🙂 x", "a\ufffd cat\ufffd"]
)
def test_texts_of_tokens(model, text):
    tokenizer = model.preprocessor.tokenizer
    ids = tokenizer.tokenize(text)
    pieces = texts_of(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert pieces[:1] == [] or pieces[0]


def test_the_first_byte_of_a_character_has_its_text(model):
    tokenizer = model.preprocessor.tokenizer
    ids = [*tokenizer.tokenize(" cat猫"), *tokenizer.tokenize(" dog é")[:-1]]
    assert texts_of(tokenizer, ids) == [
        *(" cat", "猫", "", "", " dog", " ", "\ufffd"),
    ]


def test_a_picture_of_pillow_is_one(model, says):
    asked = says("a")
    assert model.caption(Image.new("RGB", (4, 4))) == "a"
    assert asked[-1]["prompts"] == "caption en"


def test_columns_of_pictures_are_several(model, says):
    pandas = pytest.importorskip("pandas")
    column = np.array(["a.png", "b.png"])
    asked = says(*[["a", "b"]] * 3)
    for images in (column, column.astype(object), pandas.Series(column)[::-1]):
        assert model.caption(images) == ["a", "b"]
        assert len(asked[-1]["prompts"]) == 2


@pytest.mark.parametrize("images", [None, [PICTURE, None], []])
def test_a_missing_picture_is_an_error(model, images):
    for ask in (
        model.caption,
        model.encode,
        lambda images: model.ask(images, ["why?"]),
        lambda images: model.detect(images, "cat"),
    ):
        with pytest.raises(ValueError, match="picture is missing"):
            ask(images)


def test_one_label_among_lists_of_labels(model, answers):
    asked = answers((f"{HALF} cat", 0.5), (f"{HALF} dog", 0.5))
    model.detect([PICTURE] * 2, [["cat"], "dog"])
    assert asked[-1]["prompts"] == ["detect cat", "detect dog"]


@pytest.mark.parametrize("overlap", [50, -1, "0.5", math.nan])
def test_an_overlap_is_a_fraction(model, overlap):
    with pytest.raises(ValueError, match="number of 0 to 1. Received"):
        model.detect(PICTURE, "cat", overlap=overlap)


def test_objects_are_returned_and_not_answers(model):
    with pytest.raises(ValueError, match="not answers. Received: details=T"):
        model.detect(PICTURE, "cat", details=True)


def test_a_codec_is_read_first(model):
    with pytest.raises(ValueError, match=r"MaskCodec.load\('vae.npz'\)"):
        model.segment(PICTURE, "cat", "vae.npz")


def test_a_published_size_needs_its_codec(model, answers, monkeypatch):
    """The nano preset's would make other shapes of the codes."""
    width = model.backbone.text_config.hidden_dim
    monkeypatch.setitem(published_codecs.SIZES, width, "3B")
    with pytest.raises(ValueError, match=r"size 3B .*`MaskCodec.load\(path\)`"):
        model.segment(PICTURE, "cat")
    answers((f"{HALF}{MASK} cat", 0.5))
    (found,) = model.segment(PICTURE, "cat", MaskCodec.embedded())
    assert found.mask is not None
