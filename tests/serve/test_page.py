"""The server's page in a real browser: streamed text, boxes, masks."""

import base64

import numpy as np
import pytest

from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from tests.export import browser
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture
from tests.serve.test_process import SERVER
from tests.serve.test_process import process

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(browser.missing()),
        reason=f"{browser.missing()} not found: apt-get install chromium "
        "chromium-driver",
    ),
]

DISC = np.hypot(*np.mgrid[-30:30, -30:30]) < 30
BOX = "<loc0256>" * 2 + "<loc0768>" * 2
MASK = "".join(
    f"<seg{code:03}>" for code in MaskCodec.embedded().encode_mask(DISC)
)
VALUES = (-0.5, -0.1, -0.25)
# Sends a box, and the rest when the standard input is closed.
SEGMENTS = SERVER.replace(
    "limits = ",
    f"""
from keras_paligemma.serve.requests import Answered

BOX, MASK = {BOX!r}, {MASK!r}

class Model(Model):
    def answer(self, requests, tell):
        if requests[0].inputs != "segment cat":
            return super().answer(requests, tell)
        tell(0, BOX)
        sys.stdin.read()
        tell(0, MASK + " cat")
        tokens, values = (BOX, MASK, " cat"), {VALUES}
        return [Answered("".join(tokens), tokens, (7,) * 3, values, "stop")]

limits = """,
    1,
)
DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), one => one.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
const event = new DragEvent("drop", {dataTransfer, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""
SHOWN = "return !document.getElementById('view').hidden"
TEXT = "return document.getElementById('text').textContent"
ENABLED = "return !document.getElementById('go').disabled"

# Records the words that are drawn on the picture.
WORDS = """
const pen = CanvasRenderingContext2D.prototype, {fillText} = pen;
window.words = [];
pen.fillText = function (...given) {
  window.words.push(given[0]);
  return fillText.apply(this, given);
};
"""


def test_an_answer_is_shown_as_it_comes_and_its_mask_is_drawn():
    data = base64.b64encode(encode(picture(), "PNG")).decode()
    with process(code=SEGMENTS) as (server, port), browser.browser() as page:
        page.open(f"http://127.0.0.1:{port}")
        page.run(DROP, data)
        page.wait(SHOWN)
        before = page.canvas()
        page.run(WORDS)
        page.clear("#prompt")
        page.type("#prompt", "segment cat")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('<loc')")
        assert page.run(TEXT) == BOX
        assert not page.run(ENABLED)
        server.stdin.close()
        page.wait(ENABLED)
        answer = page.run(TEXT)
        assert answer == f"{BOX}{MASK} cat"
        tokens = (BOX, MASK, " cat")
        (cat,) = read_objects(
            tokens, MaskCodec.embedded(), log_probabilities=VALUES
        )
        assert page.run("return window.words") == [f"cat {cat.score:.2f}"]
        browser.check_mask(before, page.canvas(), cat, (230, 25, 75))
        page.clear("#prompt")
        page.type("#prompt", "fail")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('The server failed')")


def test_another_picture_ends_the_running_answer():
    first, second = (
        base64.b64encode(encode(picture(*size), "PNG")).decode()
        for size in ((64, 64), (96, 32))
    )
    with process(code=SEGMENTS) as (server, port), browser.browser() as page:
        page.open(f"http://127.0.0.1:{port}")
        page.run(DROP, first)
        page.wait(SHOWN)
        page.clear("#prompt")
        page.type("#prompt", "segment cat")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('<loc')")
        page.run(DROP, second)
        page.wait(ENABLED)
        page.wait(f"{TEXT} === ''")
        wanted = page.canvas()
        server.stdin.close()
        page.clear("#prompt")
        page.type("#prompt", "caption en")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('caption')")
        assert (page.canvas() == wanted).all()


def test_an_answer_without_an_end_is_an_error():
    data = base64.b64encode(encode(picture(), "PNG")).decode()
    stub = """
    window.fetch = async () => new Response('data: {"piece": "a c"}\\n\\n', {
      headers: {"Content-Type": "text/event-stream"}});
    """
    with process(code=SEGMENTS) as (_, port), browser.browser() as page:
        page.open(f"http://127.0.0.1:{port}")
        page.run(DROP, data)
        page.wait(SHOWN)
        page.run(stub)
        page.click("#go")
        page.wait(ENABLED)
        assert page.run(TEXT).endswith("no more than this came: a c")
        assert page.run("return document.getElementById('text').className")
