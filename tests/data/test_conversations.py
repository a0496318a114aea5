"""Conversations of LLaVA and ms-swift, with one question and one answer."""

import json

import numpy as np
import pytest

from keras_paligemma.data import ConversationSource
from keras_paligemma.data import ExampleError
from keras_paligemma.data import JSONLSource

PICTURE = np.zeros((2, 3, 3), "uint8")


def llava(*texts, image="cat.jpg", tag="<image>\n", **more):
    """Return a LLaVA record, in which human and gpt take turns."""
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": text}
        for number, text in enumerate(texts)
    ]
    turns[0]["value"] = tag + turns[0]["value"]
    return {"id": "1", "image": image, "conversations": turns, **more}


def swift(question, answer, images=("cat.jpg",)):
    """Return an ms-swift record."""
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": turns, "images": list(images)}


EXPECTED = {"images": "cat.jpg", "prompts": "what?", "responses": "A cat."}


@pytest.mark.parametrize(
    "record",
    [
        llava("what?", "A cat."),
        llava("what?\n<image>", "A cat.", tag=""),
        llava("what?", "A cat.", tag=""),
        swift("<image>what?", "A cat."),
        swift("<image> what? ", "A cat."),
    ],
)
def test_one_question_and_one_answer(record):
    # A loop ends with the `IndexError` of the example behind the last one.
    assert [*ConversationSource([record])] == [EXPECTED]


@pytest.mark.parametrize("lines", [False, True])
def test_files(tmp_path, lines):
    records = [llava("what?", "A cat."), llava("a", "b", "c", "d")]
    path = tmp_path / "train.json"
    text = json.dumps(records, indent=2)
    place = f"{path}[1]"
    if lines:
        text = "\n".join(map(json.dumps, records))
        place = f"{path}, line 2"
    path.write_text(text)
    source = ConversationSource(path)
    assert len(source) == 2
    assert source[0] == EXPECTED | {"images": str(tmp_path / "cat.jpg")}
    with pytest.raises(ExampleError) as raised:
        source[1]
    assert str(raised.value).startswith(f"{place}: The conversation has 4")
    elsewhere = ConversationSource(path, image_folder="pictures")
    assert elsewhere[0]["images"] == "pictures/cat.jpg"


def test_pictures_and_fields():
    stored = {"bytes": b"1", "path": None}
    pair = swift("<image><image>same?", "no", ["a.jpg", stored])
    source = ConversationSource([pair], "folder")
    assert source[0]["images"] == ["folder/a.jpg", stored]
    assert source[0]["prompts"] == "same?"
    record = llava("what?", "A cat.", image=None)
    record = {"picture": PICTURE, "chat": record["conversations"]}
    source = ConversationSource([record], turns="chat", images="picture")
    assert source[0]["images"] is PICTURE
    empty = [llava("detect dog", "")]
    assert ConversationSource(empty, allow_empty=True)[0]["responses"] == ""


@pytest.mark.parametrize(
    "record, message",
    [
        (
            llava("a", "b", "c", "d", "e", "f"),
            "6 turns, 3 questions and 3 answers",
        ),
        (llava("a"), "1 turns, 1 questions and 0 answers"),
        (
            {"image": "a", "messages": [{"role": "system", "content": "be"}]},
            "1 turns, 0 questions.*'system'",
        ),
        (swift("<image><image>a", "b"), "2 <image> and the example 1 pictures"),
        (swift("a <image> b", "c"), "<image> within its text"),
        (swift("<image>find <bbox>", "b"), "placeholder.*Received: <bbox>"),
        (swift("a", "b", []), "There is no picture"),
        (llava("a", "b", image=None), "Expected: image or images"),
        ({"image": "a.jpg"}, "Expected: conversations or messages"),
        ({"image": "a.jpg", "messages": "a"}, "no list of dictionaries"),
        (llava("a", "b") | {"conversations": [{"from": "gpt"}]}, "no text"),
        (llava("a", " "), "The answer is empty.*allow_empty"),
        (7, "A field is missing.*7"),
    ],
)
def test_what_is_refused(record, message):
    with pytest.raises(ExampleError, match=rf"(?s)list\[0\]: .*{message}"):
        ConversationSource([record])[0]


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "train.json"
    for text in ("[1,", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="train.json is not JSON"):
            ConversationSource(path)
    with pytest.raises(ValueError, match="does not exist.*none.json"):
        ConversationSource(tmp_path / "none.json")
    with pytest.raises(ValueError, match="by number"):
        ConversationSource(iter([1]))
    path.write_text(json.dumps([llava("what?", "A cat.")]))
    with pytest.raises(ValueError, match="`ConversationSource`"):
        JSONLSource(path)
