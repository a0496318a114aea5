import doctest

import pytest

from keras_paligemma.tasks import prompts


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(prompts)
    assert result.attempted and not result.failed


def test_the_published_languages():
    """Check the 35 codes of COCO-35L, and Quechua of XM3600."""
    assert len(set(prompts.LANGUAGES)) == len(prompts.LANGUAGES) == 36
    # Languages of the original's training, of xGQA, and of its evaluation.
    assert {"en", "zh", "he", "fil", "quz", "sw", "te"} <= set(
        prompts.LANGUAGES
    )
    for build in (prompts.caption, prompts.cap, prompts.describe):
        assert build("zh") == f"{build.__name__} zh"


@pytest.mark.parametrize("lang", ["xx", "EN", "english", "", None])
def test_unknown_languages_are_refused(lang):
    for build in (
        prompts.caption,
        prompts.cap,
        prompts.describe,
        lambda lang: prompts.answer("why?", lang),
        lambda lang: prompts.question("so", lang),
        lambda lang: prompts.multiple_choice("why?", ["a", "b"], lang),
    ):
        with pytest.raises(ValueError, match="language code"):
            build(lang)


def test_questions_and_answers():
    assert prompts.ocr() == "ocr"
    assert prompts.answer(" why? ", "de") == "answer de why?"
    assert prompts.question("42", "fr") == "question fr 42"
    assert (
        prompts.multiple_choice("which?", ["1 a", "b"], "id")
        == "answer id  which? choose from: 1 a \t b"
    )
    assert prompts.science_qa("Why?", ["x", " y", "z"]) == (
        "Question: Why?\nContext: \nOptions: (A) x, (B) y, (C) z\nAnswer:"
    )


@pytest.mark.parametrize("nothing", ["", "  ", None, 3])
def test_empty_words_are_refused(nothing):
    for build in (
        prompts.answer,
        prompts.question,
        lambda text: prompts.multiple_choice(text, ["a", "b"]),
        lambda text: prompts.multiple_choice("which?", ["a", text]),
        lambda text: prompts.science_qa(text, ["a", "b"]),
        lambda text: prompts.detect([text]),
    ):
        with pytest.raises(ValueError, match="a string with words in it"):
            build(nothing)


@pytest.mark.parametrize("options", [["one"], "ab", []])
def test_too_few_options_are_refused(options):
    for build in (prompts.multiple_choice, prompts.science_qa):
        with pytest.raises(ValueError, match="two or more"):
            build("which?", options)


def test_more_options_than_letters_are_refused():
    assert "(Z) z" in prompts.science_qa("which?", ["z"] * 26)
    with pytest.raises(ValueError, match="more options than letters"):
        prompts.science_qa("which?", ["z"] * 27)


@pytest.mark.parametrize("build", [prompts.detect, prompts.segment])
def test_labels(build):
    name = build.__name__
    assert build("cat") == build(["cat"]) == build((" cat ",)) == f"{name} cat"
    labels = ["cat", "the dog, black", "猫"]
    assert build(labels) == f"{name} cat ; the dog, black ; 猫"
    with pytest.raises(ValueError, match="nothing to look for"):
        build([])
    for wrong in ("cat ; dog", "cat\ndog", "<locomotive>", "a <seg001>"):
        with pytest.raises(ValueError, match="separates labels"):
            build(wrong)
