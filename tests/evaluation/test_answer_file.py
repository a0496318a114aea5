"""Writing the answers to many pictures to a file: resuming and errors."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.evaluation.answer_file import answer_file
from keras_paligemma.evaluation.answer_file import open_pictures
from tests.helpers.text_models import build_tiny_model


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture
def folder(tmp_path):
    """Write five pictures, one of them in a subfolder."""
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.PNG", "d.png", "more/e.webp"):
        pixels = random.integers(0, 255, (20, 30, 3), "uint8")
        Image.fromarray(pixels).save(place / name)
    (place / "notes.txt").write_text("no picture")
    return place


def rows_of(path):
    lines = path.read_text("utf-8").splitlines()
    return {row["id"]: row["prediction"] for row in map(json.loads, lines)}


def test_a_folder_is_answered_in_order_and_resumed(model, folder, tmp_path):
    pictures = open_pictures(folder, "caption en")
    names = ["a.png", "b.jpg", "c.PNG", "d.png", "more/e.webp"]
    assert pictures.ids == names
    path = tmp_path / "answers" / "all.jsonl"
    how = {"batch_size": 2, "max_new_tokens": 4}
    assert answer_file(model, pictures, path, **how) == 0
    whole = path.read_bytes()
    assert list(rows_of(path)) == names
    inputs = {"images": [str(folder / "d.png")], "prompts": ["caption en"]}
    assert rows_of(path)["d.png"] == model.generate(inputs, 4)[0]
    forced = tmp_path / "forced.jsonl"
    answer_file(model, pictures, forced, **how, choices=["a cat"])
    assert set(rows_of(forced).values()) == {"a cat"}
    # As if killed within the second batch, in the middle of a line.
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join(lines[:3]) + lines[3][:9])
    answer_file(model, pictures, path, **how)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cache_dtype": "int4"}, "^Unknown dtype of the cache"),
        ({"beam": 2}, "^`generate` has no option 'beam'"),
        ({"max_new_tokens": 0}, "^`max_new_tokens` is no number"),
    ],
)
def test_bad_options_are_no_error_of_a_picture(
    model, folder, tmp_path, option, message
):
    output = tmp_path / "new" / "all.jsonl"
    with pytest.raises(ValueError, match=message):
        answer_file(model, open_pictures(folder, "ocr"), output, **option)
    assert not output.parent.exists()


def test_what_cannot_be_read_is_listed_and_skipped(model, folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    how = {"batch_size": 3, "max_new_tokens": 4}
    answer_file(model, open_pictures(folder, "ocr"), path, **how)
    right = rows_of(path)
    (folder / "b.jpg").write_bytes(b"damaged")
    path.unlink()
    pictures = open_pictures(folder, "ocr")
    with pytest.warns(UserWarning, match="1 pictures could not be read.*b.jpg"):
        assert answer_file(model, pictures, path, **how) == 1
    assert rows_of(path) == right | {"b.jpg": ""}
    listed = tmp_path / "answers.jsonl.errors.jsonl"
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert line["id"] == "b.jpg" and "b.jpg" in line["error"]


def test_lines_have_prompts_and_names_of_their_own(folder):
    file = folder / "list.jsonl"
    lines = [
        {"image": "a.png", "prefix": "ocr"},
        {"image": str(folder / "b.jpg"), "id": "second"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    pictures = open_pictures(file, "caption en")
    assert pictures.ids == ["1", "second"]
    assert pictures.prompts == ["ocr", "caption en"]
    assert pictures.images == [str(folder / "a.png"), str(folder / "b.jpg")]
    with pytest.raises(ValueError, match="'second' is not said"):
        open_pictures(file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 names no picture.*Received: b'{'"),
        ('{"picture": "a.png"}', "line 2 names no picture"),
        ('{"image": "a.png", "id": "1"}', "1"),
        (None, "has no pictures"),
    ],
)
def test_lists_that_mean_nothing(folder, line, message):
    file = folder / "list.jsonl"
    first = '{"image": "a.png", "prefix": "ocr"}\n'
    file.write_text("" if line is None else first + line)
    with pytest.raises(ValueError, match=message):
        open_pictures(file, "ocr")


def test_a_file_of_other_pictures_is_refused(model, folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "other", "prediction": "x"}\n')
    with pytest.raises(ValueError, match="rows of another run.*'other'"):
        answer_file(model, open_pictures(folder, "ocr"), path)
