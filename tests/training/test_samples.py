"""Answers after an epoch: kept, printed and drawn."""

import numpy as np
from PIL import Image

from keras_paligemma.training import SamplePredictions
from keras_paligemma.training.samples import contact_sheet
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


def test_boxes_are_drawn_where_they_are():
    images = [np.zeros((50, 100, 3), "uint8")] * 5
    answer = "<loc0000><loc0000><loc1023><loc0512> cat"
    sheet = contact_sheet(images, [answer] + [""] * 4, side=200)
    assert isinstance(sheet, Image.Image) and sheet.size == (800, 400)
    pixels = np.asarray(sheet)
    assert (pixels[:100, :200].max(-1) > 100).any()
    assert not pixels[5:90, 205:395].any()
