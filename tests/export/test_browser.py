"""The example server's page in a real browser, as a user operates it."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks.answers import read_objects
from tests.export import browser
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture

pytest.importorskip("tensorflow_text")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(browser.missing()),
        reason=f"{browser.missing()} not found: apt-get install chromium "
        "chromium-driver",
    ),
]

BELL = Path(__file__).parents[2] / "examples" / "pictures" / "scene_1.png"
# The page's new text, once it is not waiting for a reply.
SAID = """
const text = document.getElementById("text");
if (document.getElementById("go").disabled || !text.textContent) return null;
if (text.textContent === arguments[0]) return null;
return [text.textContent, text.className];
"""
SHOWN = "return !document.getElementById('view').hidden"
# The bounds of the first box's colour in pixels: left, top, right, bottom.
BOX = """
const view = document.getElementById("view");
const {width, height} = view;
const {data} = view.getContext("2d").getImageData(0, 0, width, height);
let [left, top, right, bottom] = [width, height, -1, -1];
for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
  const at = 4 * (y * width + x);
  if (data[at] != 230 || data[at + 1] != 25 || data[at + 2] != 75) continue;
  left = Math.min(left, x); right = Math.max(right, x);
  top = Math.min(top, y); bottom = Math.max(bottom, y);
}
return [left, top, right, bottom];
"""
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), one => one.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
const event = new DragEvent("drop", {dataTransfer, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""
DRAWN = "draw(arguments[0]).then(labels => { window.drawn = labels; });"


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as one:
        yield one


@pytest.fixture
def page(chromium, address):
    """Open the page."""
    chromium.open(address)
    return chromium


def ask(page, prompt):
    """Type a prompt, press the button, and return the page's new text."""
    page.clear("#prompt")
    page.type("#prompt", prompt)
    page.click("#go")
    return page.wait(SAID)


def test_a_chosen_picture_gets_text_and_boxes(page, tmp_path):
    page.type("#file", str(BELL))
    page.wait(SHOWN)
    assert page.run(BOX)[2] == -1
    text, kind = ask(page, "detect bell")
    assert text.endswith(" bell")
    assert text.startswith("<loc")
    assert kind == ""
    y1, x1, y2, x2 = (int(text[4 + 9 * n : 8 + 9 * n]) for n in range(4))
    wanted = np.array([x1, y1, x2, y2]) / 1023 * 448
    # The label is above the box, and may extend beyond its right edge.
    left, top, right, bottom = page.run(BOX)
    assert abs(left - wanted[0]) <= 3
    assert abs(bottom - wanted[3]) <= 3
    assert top < wanted[1]
    assert right >= wanted[2] - 3
    shot = Image.open(io.BytesIO(page.screenshot()))
    shot.save(tmp_path / "page.png")
    colours = np.asarray(shot.convert("RGB")).reshape(-1, 3)
    assert (colours == [230, 25, 75]).all(1).sum() > 100


def test_boxes_of_an_answer(page):
    """Compare with the package: a mask, another script, boxes to leave out."""
    place = "<loc0010><loc0020><loc0300><loc0400>"
    masks = "".join(f"<seg{7 * i:03d}>" for i in range(16))
    reversed_place = "<loc0400><loc0300><loc0020><loc0010>"
    text = f"{place}{masks} black cat ; {place} 猫 ; {reversed_place} x"
    text += f" ; {place}<loc0500> y ; <loc9999>{place[9:]} z"
    found = page.run("return boxesOf(arguments[0])", text)
    wanted = read_objects(text)
    assert len(wanted) == 2
    for box, item in zip(found, wanted, strict=True):
        edges = [box[edge] for edge in ("y1", "x1", "y2", "x2")]
        np.testing.assert_allclose(edges, item.box, rtol=1e-15)
        assert box["label"] == item.label
    assert page.run("return boxesOf('a cat <loc0010>')") == []


def test_labels_can_all_be_read(page):
    """Check ten boxes, some of them equal or at the picture's edges."""
    page.run(DROP, base64.b64encode(BELL.read_bytes()).decode())
    page.wait(SHOWN)
    boxes = [
        {"x1": x, "y1": y, "x2": 1, "y2": 1, "label": "butterfly", "score": 0.5}
        for x, y in [(0.2, 0.3)] * 4 + [(0.25, 0.98)] * 4 + [(0.95, 0)] * 2
    ]
    page.run(DRAWN, boxes)
    labels = page.wait("return window.drawn")
    assert len(labels) == 10
    for index, one in enumerate(labels):
        assert one["x"] >= 0
        assert one["y"] >= 0
        assert one["x"] + one["width"] <= 448
        assert one["y"] + one["height"] <= 448
        for other in labels[:index]:
            assert (
                one["x"] >= other["x"] + other["width"]
                or other["x"] >= one["x"] + one["width"]
                or one["y"] >= other["y"] + other["height"]
                or other["y"] >= one["y"] + one["height"]
            )


def test_a_dropped_picture_gets_text(page):
    page.run(DROP, base64.b64encode(BELL.read_bytes()).decode())
    page.wait(SHOWN)
    assert ask(page, "caption en") == ["a bell", ""]


def test_what_is_wrong_is_said(page, tmp_path):
    text, kind = ask(page, "caption en")
    assert (text, kind) == ("Choose a picture first.", "error")
    (tmp_path / "text.png").write_text("Good morning")
    page.type("#file", str(tmp_path / "text.png"))
    text, kind = page.wait(SAID, text)
    assert "not a picture" in text
    assert kind == "error"
    # The browser can show this file, but the model cannot read it.
    (tmp_path / "bitmap.bmp").write_bytes(encode(picture(), "BMP"))
    page.type("#file", str(tmp_path / "bitmap.bmp"))
    page.wait(SHOWN)
    text, kind = ask(page, "caption en")
    assert "Expected: the bytes of a JPEG, PNG, WebP or GIF" in text
    assert kind == "error"
    page.type("#file", str(BELL))
    page.wait("return !document.getElementById('text').textContent")
    assert "does not fit" in ask(page, "very " * 90)[0]
    assert ask(page, "caption en") == ["a bell", ""]
