"""Third-party data sets: fields, prompts, and unreadable examples by index."""

import io

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data import ExampleError
from keras_paligemma.data import FieldSource
from keras_paligemma.data import check

PICTURE = np.zeros((2, 3, 3), "uint8")
ROWS = [
    {"image": PICTURE, "question": b"who?", "answers": ["I", "you"], "label": 3}
]


def test_fields_prompts_and_functions():
    source = FieldSource(
        ROWS, prompts="answer en {question}", responses="answers"
    )
    assert len(source) == 1
    assert source[0]["images"] is PICTURE
    assert source[0]["prompts"] == "answer en who?"
    assert source[0]["responses"] == ["I", "you"]
    source = FieldSource(
        ROWS,
        images=lambda example: [example["image"]] * 2,
        prompts=lambda example: f"count to {example['label']}",
        responses=lambda example: str(example["label"]),
    )
    assert len(source[0]["images"]) == 2
    assert source[0]["prompts"] == "count to 3"
    assert source[0]["responses"] == "3"
    # A prompt is used literally, even if a field has that name.
    assert FieldSource(ROWS, prompts="question", responses="answers")[0][
        "prompts"
    ] == ("question")


def test_arrays_of_bytes_are_text():
    rows = [{"image": PICTURE, "caption": np.array([b"a", "ä".encode()], "O")}]
    assert FieldSource(rows)[0]["responses"] == ["a", "ä"]
    rows = [{"image": PICTURE, "caption": np.array("one")}]
    assert FieldSource(rows)[0]["responses"] == "one"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"responses": "caption"}, r"list\[0\]: There is no field 'caption'"),
        ({"responses": "label"}, r"list\[0\]: The answer is not text"),
        (
            {"prompts": "answer {what}", "responses": "answers"},
            "no field 'what'.*'answers', 'image'",
        ),
        (
            {"prompts": "count {label}", "responses": "answers"},
            "Field 'label' is not text",
        ),
        (
            {"images": "picture", "responses": "answers"},
            "no field 'picture'",
        ),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ExampleError, match=message):
        FieldSource(ROWS, **fields)[0]


def test_empty_answers_on_request():
    rows = [
        {"image": PICTURE, "caption": text} for text in ("", b"", ["a", ""])
    ]
    source = FieldSource(rows, allow_empty=True)
    assert [example["responses"] for example in source] == ["", "", ["a", ""]]
    for index in range(3):
        with pytest.raises(ExampleError, match="is empty.*allow_empty=True"):
            FieldSource(rows)[index]
    with pytest.raises(ExampleError, match="answer is not text.*None"):
        FieldSource([{"image": PICTURE, "caption": None}], allow_empty=True)[0]


def test_streams_and_dictionaries_are_refused():
    with pytest.raises(ValueError, match="by number.*generator.*streaming"):
        FieldSource(row for row in ROWS)
    with pytest.raises(ValueError, match=r"one of them.*\['test', 'train'\]"):
        FieldSource({"train": ROWS, "test": ROWS})
    table = type("Table", (list,), {"to_pylist": lambda self: list(self)})
    with pytest.raises(ValueError, match=r"`.to_pylist\(\)`.*Table"):
        FieldSource(table(ROWS))


def test_text_alone_is_checked():
    rows = [{"images": None, "prompts": "caption en", "responses": "a cat"}] * 2
    found = []
    assert check(rows, lambda example: found.append(example["images"])) == []
    assert found == [None, None]
    (problem,) = check([*rows, rows[0] | {"images": PICTURE}])
    assert "has 1 frames" in problem and "has 0" in problem


def test_pictures_as_hugging_face_stores_them():
    """Dicts of bytes and path, as in parquet files; one or several of them."""
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    stored = {"bytes": file.getvalue(), "path": None}
    frames = np.array([stored, stored, None])[:2]  # As pandas reads a list.
    for pictures in (stored, [stored], frames):
        source = FieldSource([{"image": pictures, "caption": "a cat"}])
        assert check(source) == []
    seen = []
    check(source, lambda example: seen.extend(example["images"]))
    np.testing.assert_array_equal(seen, [PICTURE, PICTURE])
