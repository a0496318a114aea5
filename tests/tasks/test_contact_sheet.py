"""Contact sheets: each caption stays below its own picture."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks.contact_sheet import CELL
from keras_paligemma.tasks.contact_sheet import MARGIN
from keras_paligemma.tasks.contact_sheet import contact_sheet


def test_a_long_caption_stays_below_its_picture():
    pictures = [Image.new("RGB", (CELL, CELL), "blue")] * 2
    alone = np.asarray(contact_sheet(pictures, ["", "dog"]))
    both = np.asarray(contact_sheet(pictures, ["a cat and " * 40, "dog"]))
    second = MARGIN + CELL + MARGIN
    np.testing.assert_array_equal(both[:, second:], alone[:, second:])
    assert (both[:, :second] != alone[:, :second]).any()


def test_a_caption_of_several_lines_is_on_one():
    pictures = [Image.new("RGB", (CELL, CELL), "blue")] * 2
    found, wanted = (
        contact_sheet(pictures, [caption, "dog"])
        for caption in ("one\n two\r\n\tthree\n", "one two three")
    )
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("count", [0, 1])
def test_a_sheet_has_pictures_and_their_captions(count):
    pictures = [Image.new("RGB", (CELL, CELL))] * count
    with pytest.raises(ValueError, match=f"Received: {count} pictures, 0 c"):
        contact_sheet(pictures, [])
