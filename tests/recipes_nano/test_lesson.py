"""Tests of the nano preset's questions and of a training step's arrays."""

import keras
import numpy as np
import pytest

from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer
from recipes.nano import lesson
from recipes.nano import lettering
from recipes.nano import questions
from recipes.nano import train
from recipes.nano.fetch import CLASSES
from recipes.nano.scenes import Letter
from recipes.nano.scenes import Placed
from recipes.nano.scenes import Scene
from recipes.nano.scenes import location_tokens

CODES = "<seg001>" * 16
OBJECTS = [
    Placed("cat", (0, 0, 42, 28)),
    Placed("owl", (56, 42, 84, 70), codes=CODES),
    Placed("cat", (28, 84, 56, 112)),
]
BOXES = [location_tokens(placed.box, 112) for placed in OBJECTS]
IMAGE = np.random.default_rng(0).integers(256, size=(112, 112, 3))
SCENE = Scene(IMAGE.astype("uint8"), OBJECTS)
WORD = SCENE._replace(
    objects=OBJECTS[1:2],
    letters=[
        Letter("h", (90, 10.0, 112, 24.5)),
        Letter("i", (90, 24.5, 112, 29.0)),
        Letter("7", (90, 29.0, 112, 43.0)),
    ],
)


def ask_all(task, scene=SCENE, seeds=40):
    """Return a task's questions for several seeds, by their prompts."""
    asked = [
        questions.TASKS[task](np.random.default_rng(seed), scene, list(CLASSES))
        for seed in range(seeds)
    ]
    return {question.prompt: question for question in asked if question}


@pytest.fixture(scope="module")
def preprocessor():
    tokenizer = PaliGemmaTokenizer(str(train.FOLDER / "tokenizer.model"))
    return PaliGemmaCausalLMPreprocessor(
        tokenizer,
        None,
        prompt_length=lesson.PROMPT_LENGTH,
        response_length=28,
        on_long_response="error",
    )


def test_labels_are_answered_in_their_order_and_absent_ones_left_out():
    asked = ask_all("detect_several")
    both = asked["detect owl ; cat"]
    assert both.response == (
        f"{BOXES[1]} owl ; {BOXES[0]} cat ; {BOXES[2]} cat"
    )
    assert both.mentioned == [[1], [0, 2]]
    assert asked["detect cat ; owl"].mentioned == [[0, 2], [1]]
    with_absent = [
        question
        for prompt, question in asked.items()
        if not set(prompt[7:].split(" ; ")) <= {"cat", "owl"}
    ]
    assert with_absent
    for question in with_absent:
        asked_for = question.prompt[7:].split(" ; ")
        for name in CLASSES:
            wanted = name in asked_for and name in ("cat", "owl")
            assert question.response.count(f" {name}") == wanted * (
                2 if name == "cat" else 1
            )


def test_a_segmentation_is_of_one_object():
    asked = ask_all("segment")
    assert set(asked) == {"segment owl"}
    assert asked["segment owl"].response == (f"{BOXES[1]}{CODES} owl")


def test_a_count_mentions_all_of_a_class():
    asked = ask_all("count")
    assert asked["answer en how many cat?"].mentioned == [[0, 2]]
    assert asked["answer en how many cat?"].response == "2"


def test_words_are_read_and_captions_translated():
    assert ask_all("read") == {}
    asked = ask_all("read", WORD)
    assert asked == {"ocr": questions.Question("ocr", "hi7", [[1], [2], [3]])}
    asked = ask_all("translate", WORD)
    assert asked["caption fr"].response == "une chouette"
    assert len(asked) == 4
    # A class that occurs twice has no caption.
    assert ask_all("translate") == {}


def test_patches_show_the_largest_part_of_a_letter():
    which = lesson.object_of_patches(WORD).reshape(8, 8)
    # The narrow "i" has the largest part of no patch.
    for row in (6, 7):
        np.testing.assert_array_equal(which[row, :4], [1, 1, 3, -1])
    assert set(which[:4].ravel()) == {-1}


def test_half_patches_show_the_largest_part_of_a_letter():
    letters = lesson.letters_of_halves(WORD).reshape(8, 16)
    h, seven = (1 + lettering.CHARACTERS.index(name) for name in "h7")
    expected = [0, h, h, h, seven, seven, 0, 0]
    for row in (6, 7):
        np.testing.assert_array_equal(letters[row, :8], expected)
    assert not letters[:6].any() and not letters[:, 8:].any()


def test_words_are_spelled(preprocessor):
    asked = [
        questions.Question("caption en", "a lion", [[0]]),
        questions.Question("ocr", "lion7", []),
    ]
    columns = {
        "prompts": [question.prompt for question in asked],
        "responses": [question.response for question in asked],
    }
    inputs, targets, weights = preprocessor(columns)
    before = {name: array.copy() for name, array in inputs.items()}
    lesson.spell(asked, inputs, targets, weights, preprocessor.tokenizer)
    tokenizer = preprocessor.tokenizer
    ids = [tokenizer.token_to_id(letter) for letter in "lion7"]
    ids += [tokenizer.end_token_id]
    assert targets[1].tolist() == ids + [0] * 22
    assert weights[1].tolist() == [1.0] * 6 + [0.0] * 22
    whole = inputs["token_ids"][1], inputs["padding_mask"][1]
    np.testing.assert_array_equal(whole[0][-28:], targets[1])
    np.testing.assert_array_equal(whole[1][-28:], weights[1] > 0)
    np.testing.assert_array_equal(
        inputs["response_mask"][1][-28:], weights[1] > 0
    )
    assert tokenizer.detokenize(ids[:-1]) == "lion7"
    # The prompt, and other rows, stay.
    for name, array in before.items():
        np.testing.assert_array_equal(inputs[name][0], array[0])
        np.testing.assert_array_equal(inputs[name][1, :8], array[1, :8])


def test_four_of_a_class_can_only_be_counted():
    crowd = [Placed("cat", (0, i, 9, i + 9)) for i in range(0, 90, 20)]
    scene = Scene(IMAGE, crowd)
    asked = questions.ask(
        np.random.default_rng(0), scene, CLASSES, {"detect": 1}, 2
    )
    assert asked[0] != asked[1]
    assert [question.prompt[:15] for question in asked] == [
        "answer en how m",
        "answer en how m",
    ]


def test_patches_belong_to_the_object_around_their_middle():
    which = lesson.object_of_patches(SCENE).reshape(8, 8)
    wanted = np.full((8, 8), -1)
    wanted[:3, :2], wanted[4:6, 3:5], wanted[2:4, 6:8] = 0, 1, 2
    np.testing.assert_array_equal(which, wanted)


@pytest.mark.parametrize("number", [16, 64])
def test_patches_that_are_kept_show_each_object(number):
    which = lesson.object_of_patches(SCENE)
    kept = lesson.some_patches(np.random.default_rng(0), which, number)
    assert len(set(kept.tolist())) == number
    assert np.all(np.diff(kept) > 0)
    for picture, patches in enumerate((6, 4, 4)):
        assert (which[kept] == picture).sum() >= min(
            patches, lesson.PATCHES_KEPT
        )


def arrays(preprocessor, number):
    which = lesson.object_of_patches(SCENE)
    kept = lesson.some_patches(np.random.default_rng(0), which, number)
    asked = [
        ask_all("detect_several")["detect owl ; cat"],
        ask_all("count")["answer en how many cat?"],
    ]
    return lesson.batch(
        [SCENE],
        [asked],
        which[None],
        kept[None],
        preprocessor,
    )


def test_places_follow_the_answer(preprocessor):
    x, y, w = arrays(preprocessor, 24)
    which = lesson.object_of_patches(SCENE)[x["kept"][0]]
    several, counted = y["places"][0]
    for kind, place in ((-1, 0), (0, 2), (1, 1), (2, 2)):
        assert set(several[which == kind]) == {place}
    for kind, place in ((-1, 0), (0, 1), (1, 0), (2, 1)):
        assert set(counted[which == kind]) == {place}
    np.testing.assert_allclose(w["tokens"].sum(-1), lesson.MEAN_TOKENS)
    assert list(CLASSES)[y["names"][0, 0] - 1] == "cat"
    np.testing.assert_array_equal(
        y["boxes"][0, 0], np.round(np.array([0, 0, 42, 28]) / 112 * 1023)
    )


def test_a_lesson_computes_what_the_model_does(preprocessor):
    """With all patches and several questions, logits equal the backbone's."""
    keras.utils.set_random_seed(0)
    narrow = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 16}
    backbone = PaliGemmaBackbone(
        lesson.SIZE,
        train.VISION_ENCODER | narrow | {"num_heads": 2},
        train.TEXT_DECODER | narrow | {"head_dim": 4},
        form="unrolled",
    )
    # The projector starts at zero, where pictures would have no effect.
    projector = backbone.vision_encoder.projector
    projector.kernel.assign(
        np.random.default_rng(0).normal(size=projector.kernel.shape)
    )
    x, _, _ = arrays(preprocessor, 64)
    found = lesson.Lesson(backbone)(x)
    for row in range(2):
        inputs = {
            name: x[name][:, row]
            for name in ("token_ids", "padding_mask", "response_mask")
        }
        images = x["images"].astype("float32") / 127.5 - 1
        hidden = backbone({"images": images, **inputs})
        wanted = backbone.logits(hidden[:, -29:-1])
        valid = inputs["response_mask"][:, lesson.PROMPT_LENGTH :]
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(found["tokens"])[:, row][valid],
            keras.ops.convert_to_numpy(wanted)[valid],
            atol=1e-4,
        )
    assert found["places"].shape == (1, 2, 64, lesson.PLACES)


def test_stages_fit_the_layout():
    for stage in train.STAGES:
        assert stage.trains in ("encoder", "decoder", "both")
        assert set(stage.shares) <= set(questions.TASKS)
        assert stage.patches <= lesson.SIDE**2
