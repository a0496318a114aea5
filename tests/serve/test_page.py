"""The server's page in a real browser: pieces as they come, boxes, masks."""

import base64

import pytest

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

# Says a box, and the rest when the standard input is closed.
SEGMENTS = SERVER.replace(
    "limits = ",
    """
from keras_paligemma.serve.requests import Answered

BOX = "".join(f"<loc{place:04}>" for place in (256, 256, 768, 768))
MASK = "".join(f"<seg{code:03}>" for code in range(16))

class Model(Model):
    def answer(self, requests, tell):
        if requests[0].inputs != "segment cat":
            return super().answer(requests, tell)
        tell(0, BOX)
        sys.stdin.read()
        tell(0, MASK + " cat")
        return [Answered(f"{BOX}{MASK} cat", (), (7,), (-0.5,), "stop")]

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
# How many pixels differ from those of the script before.
CHANGED = """
const view = document.getElementById("view");
const {width, height} = view;
const {data} = view.getContext("2d").getImageData(0, 0, width, height);
const before = window.before;
window.before = data;
return before ? data.filter((one, at) => one != before[at]).length : 0;
"""


def test_an_answer_is_shown_as_it_comes_and_its_mask_is_drawn():
    data = base64.b64encode(encode(picture(), "PNG")).decode()
    with process(code=SEGMENTS) as (server, port), browser.browser() as page:
        page.open(f"http://127.0.0.1:{port}")
        page.run(DROP, data)
        page.wait(SHOWN)
        assert page.run(CHANGED) == 0
        page.clear("#prompt")
        page.type("#prompt", "segment cat")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('<loc')")
        assert page.run(TEXT) == "<loc0256>" * 2 + "<loc0768>" * 2
        assert not page.run(ENABLED)
        server.stdin.close()
        page.wait(ENABLED)
        assert page.run(TEXT).endswith("<seg015> cat")
        # The box's edge and label alone are some thousands; the mask is more.
        assert page.run(CHANGED) > 20_000
        page.clear("#prompt")
        page.type("#prompt", "fail")
        page.click("#go")
        page.wait(f"{TEXT}.startsWith('The server failed')")
