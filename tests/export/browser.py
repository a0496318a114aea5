"""Drive a headless Chromium by WebDriver, JSON over HTTP, without a package."""

import base64
import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
from PIL import ImageFilter

FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium has no sandbox for root, CI's user.
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=800,900",
)
# WebDriver's key for element references.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing():
    """List the programs that are not installed."""
    wanted = ("chromium", "chromedriver")
    return [name for name in wanted if shutil.which(name) is None]


class Browser:
    """One page in one window; see https://www.w3.org/TR/webdriver2.

    Args:
        address: str, the session: "http://127.0.0.1:…/session/…".
    """

    def __init__(self, address):
        self.address = address

    def open(self, url):
        _call(f"{self.address}/url", {"url": url})

    def type(self, css, text):
        """Type into a field, or choose a file by its path."""
        _call(f"{self._element(css)}/value", {"text": text})

    def clear(self, css):
        _call(f"{self._element(css)}/clear", {})

    def click(self, css):
        _call(f"{self._element(css)}/click", {})

    def run(self, script, *arguments):
        """Run the body of a JavaScript function and return its result."""
        body = {"script": script, "args": arguments}
        return _call(f"{self.address}/execute/sync", body)

    def wait(self, script, *arguments, seconds=30):
        """Wait until a function's result is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            if time.monotonic() > end:
                raise TimeoutError(f"Never true in {seconds} s: {script}")
            time.sleep(0.05)
        return found

    def screenshot(self):
        """Return the window as the bytes of a PNG."""
        return base64.b64decode(_call(f"{self.address}/screenshot"))

    def canvas(self):
        """Return the pixels of the page's picture, (height, width, RGB)."""
        uri = self.run("return document.getElementById('view').toDataURL()")
        content = base64.b64decode(uri.partition(",")[2])
        with Image.open(io.BytesIO(content)) as picture:
            return np.asarray(picture.convert("RGB"), "float64")

    def _element(self, css):
        query = {"using": "css selector", "value": css}
        found = _call(f"{self.address}/element", query)
        return f"{self.address}/element/{found[ELEMENT]}"


def check_mask(before, after, one, colour):
    """Compare a canvas with the mask that the page should have drawn.

    Args:
        before, after: arrays, from `Browser.canvas`.
        one: `Object` with a mask.
        colour: tuple (red, green, blue), the object's colour.
    """
    size = before.shape[:2]
    mask = Image.fromarray(one.mask_in(size))
    y1, x1, y2, x2 = one.pixels(size)
    # The browser blends the edges of the 64 × 64 mask.
    blur = 2 * (2 + max(y2 - y1, x2 - x1) // 64) + 1
    inner = np.asarray(mask.convert("L").filter(ImageFilter.MinFilter(blur)))
    outer = np.asarray(mask.convert("L").filter(ImageFilter.MaxFilter(blur)))
    # The box is drawn as lines, and its label may cover the upper edge.
    inside = np.zeros(size, bool)
    inside[max(y1 + blur, 40) : y2 - blur, x1 + blur : x2 - blur] = True
    coloured = inside & (inner > 0)
    plain = inside & (outer == 0)
    assert coloured.sum() > 500 and plain.sum() > 500
    blended = 0.55 * before + 0.45 * np.array(colour)
    assert np.abs(after - blended)[coloured].max() <= 2
    assert np.abs(after - before)[plain].max() == 0


@contextlib.contextmanager
def browser():
    """Start Chromium and its driver, and stop both on exit."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with driver:
            try:
                for line in driver.stdout:
                    if "started successfully on port" in line:
                        break
                port = line.rstrip(".\n").rpartition(" ")[2]
                address = f"http://127.0.0.1:{port}/session"
                options = {
                    "binary": shutil.which("chromium"),
                    "args": [*FLAGS, f"--user-data-dir={profile}"],
                }
                wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
                session = _call(address, {"capabilities": wanted})
                address = f"{address}/{session['sessionId']}"
                yield Browser(address)
                _call(address, method="DELETE")
            finally:
                driver.kill()


def _call(url, body=None, method=None):
    """Send one command and return its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]
    except urllib.error.HTTPError as error:
        with error:
            told = json.load(error)["value"]["message"]
        raise RuntimeError(f"The browser refused: {told}") from error
