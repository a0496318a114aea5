"""Answers after each epoch: stored, printed and drawn."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks.contact_sheet import CELL
from keras_paligemma.tasks.contact_sheet import FONT_SIZE
from keras_paligemma.tasks.contact_sheet import MARGIN
from keras_paligemma.tasks.contact_sheet import contact_sheet
from keras_paligemma.training import SamplePredictions
from tests.training import killed_run


def test_answers_after_each_epoch(tmp_path, capsys):
    model, batches = killed_run.set_up()
    examples = {
        "images": [np.zeros((9, 9, 3), "uint8")] * 2,
        "prompts": ["caption en", "detect cat"],
        "responses": ["a cat", "cat"],
    }
    look = SamplePredictions(examples, tmp_path, every=2, max_new_tokens=3)
    model.fit(batches, epochs=4, verbose=0, callbacks=[look])
    assert set(look.answers) == {2, 4}
    assert look.answers[4] == model.generate(
        {key: examples[key] for key in ("images", "prompts")}, max_new_tokens=3
    )
    assert "'detect cat' -> " in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch_0002.png", "epoch_0004.png"]


def test_boxes_are_drawn_and_words_written(tmp_path):
    class Answers:
        def generate(self, inputs, max_new_tokens):
            box = "<loc0000><loc0000><loc1023><loc0512> cat"
            return [box] + [""] * (len(inputs["prompts"]) - 1)

    examples = {
        "images": [np.zeros((50, 100, 3), "uint8")] * 4,
        "prompts": ["detect cat"] * 4,
    }
    look = SamplePredictions(examples, tmp_path)
    look.set_model(Answers())
    look.on_epoch_end(0)
    sheet = Image.open(tmp_path / "epoch_0001.png")
    assert sheet.size == contact_sheet([sheet] * 4, [""] * 4).size
    pixels = np.asarray(sheet)
    first = pixels[MARGIN : MARGIN + 200, MARGIN : MARGIN + CELL]
    second = pixels[MARGIN : MARGIN + 200, 2 * MARGIN + CELL : 2 * CELL]
    assert (first.max(-1) > 100).any() and not second.any()
    words = pixels[MARGIN + CELL :][: 2 * FONT_SIZE]
    assert (words[:, :CELL] < 100).any() and (words[:, CELL + 8 :] > 200).all()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": None}, "equally long lists"),
        ({"prompts": "caption en"}, "'prompts': None"),
        ({"responses": ["a", "b"]}, "'responses': 2"),
        ({"responses": 3}, "'responses': None"),
        ({"images": [], "prompts": []}, "one or more.*'images': 0"),
        ({"every": 0}, "at least 1"),
    ],
)
def test_samples_that_mean_nothing(change, words):
    examples = {"images": ["a.png"], "prompts": ["caption en"]} | change
    every = examples.pop("every", 1)
    examples = {
        key: example for key, example in examples.items() if example is not None
    }
    with pytest.raises(ValueError, match=words):
        SamplePredictions(examples, every=every)


def test_pictures_are_drawn_as_the_model_sees_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30)).save(tmp_path / "turned.jpg", exif=exif)
    turned = tmp_path / "turned.jpg"
    images = [
        turned,
        turned.read_bytes(),
        [turned, np.zeros((9, 9, 3), "uint8")],
        Image.fromarray(np.full((9, 9), 32768, "uint16")),
        np.full((2, 9, 9, 3), 7.0),
    ]

    class Silent:
        def generate(self, inputs, max_new_tokens):
            return [""] * len(inputs["prompts"])

    examples = {"images": images, "prompts": ["caption en"] * len(images)}
    look = SamplePredictions(examples, tmp_path)
    look.set_model(Silent())
    look.on_epoch_end(0)
    pixels = np.asarray(Image.open(tmp_path / "epoch_0001.png"))

    def cell(row, column):
        y = MARGIN + row * (MARGIN + CELL + 2 * FONT_SIZE)
        x = MARGIN + column * (MARGIN + CELL)
        return pixels[y : y + CELL, x : x + CELL]

    for column in range(3):  # Twice as high as wide.
        upright = cell(0, column)
        assert (upright[:, : CELL // 2] == 0).all()
        assert (upright[:, CELL // 2 :] == 255).all()
    assert (cell(1, 0) == 128).all() and (cell(1, 1) == 7).all()
