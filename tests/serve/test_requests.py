"""What the parts of a request may be, and what a refusal names."""

import dataclasses
import re

import pytest

from keras_paligemma.serve import requests
from keras_paligemma.serve.requests import Choice
from keras_paligemma.serve.requests import Field
from keras_paligemma.serve.requests import Limits
from keras_paligemma.serve.requests import Refused
from keras_paligemma.serve.tokens import characters
from tests.helpers.encoded_pictures import encode
from tests.helpers.encoded_pictures import picture

FIELDS = {
    "prompt": Field("string", "", default=...),
    "count": Field("integer", "", least=1, most=4, default=2),
    "share": Field("number", "", least=0, most=1),
    "streams": Field("boolean", ""),
    "stop": Field("strings", ""),
    "user": Field("any", ""),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("stop", ["a", ["a", "b"], []])
def test_fields(count, stop):
    given = {"prompt": "a", "count": count, "share": 1, "stop": stop}
    given |= {"streams": False, "user": True}
    assert requests.read_fields(given | {"n": 1}, FIELDS, ["n"]) == given
    missing = dict.fromkeys(FIELDS) | {"prompt": "a", "count": 2}
    assert requests.read_fields({"prompt": "a", "user": None}, FIELDS) == (
        missing
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", None, "The field `prompt` is missing"),
        ("prompt", 3, "Expected: string. Received: 3"),
        ("prompt", "\ud800", "`prompt` is no text"),
        ("count", 0, "Expected: integer, 1 to 4. Received: 0"),
        ("count", 5, "1 to 4"),
        ("count", 2.0, "integer"),
        ("count", True, "integer"),
        ("share", 1.01, "number, 0 to 1"),
        ("share", False, "number"),
        ("streams", 1, "boolean"),
        ("stop", ["a", 1], "strings"),
        ("stop", {"a": 1}, "strings"),
        ("other", 1, "Unknown field 'other'. Expected: prompt, count"),
    ],
)
def test_bad_fields_are_named(name, value, message):
    with pytest.raises(Refused, match=message) as caught:
        requests.read_fields({"prompt": "a"} | {name: value}, FIELDS)
    assert (caught.value.status, caught.value.field) == (400, name)


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (requests.read_json, b"[1]", "no JSON object.*Received: list"),
        (requests.read_json, b'{"a": Infinity}', "Infinity is no number"),
        (requests.read_json, b"[" * 60_000, r"not JSON: \w+"),
        (requests.read_base64, "data:image/png,aGk=", "URI is not in base64"),
        (requests.read_base64, "aG k=", "not base64"),
        (requests.read_base64, "é", "not base64"),
        (requests.read_stop, list("abcde"), "at most 4 strings"),
        (requests.read_stop, "", "1 to 100"),
        (requests.read_stop, ["x" * 101], "1 to 100"),
    ],
)
def test_what_cannot_be_read_is_refused(read, value, message):
    with pytest.raises(Refused, match=message) as caught:
        read(value)
    assert caught.value.status == 400


def test_what_can_be_read():
    assert requests.read_json('{"a": "é"}'.encode("utf-16")) == {"a": "é"}
    for text in ("aGk=", "data:image/png;base64,aGk=", "DATA:;BASE64,aGk="):
        assert requests.read_base64(text) == b"hi"
    assert requests.read_stop(None) == ()
    assert requests.read_stop("a") == ("a",)
    assert requests.read_stop(["x" * 100, *"abc"]) == ("x" * 100, *"abc")


def test_bytes_that_spell_no_character_are_replaced():
    """One by one, as in the text that SentencePiece makes of them."""
    tokens = ["<0xE2>", "a", "<0xC3>", "<0xA9>", "<0xE9>", "b"]
    assert characters(tokens) == ["\ufffd", "a", "é\ufffd", "", "", "b"]
    # Three of the four bytes of an emoji, at the end of the longest answer.
    tokens = ["<0xF0>", "<0x9F>", "<0x99>"]
    assert characters(tokens) == ["\ufffd" * 3, "", ""]


def test_limits():
    limits = Limits(pixels=6, prompt=3)
    requests.check_prompt("abc", limits)
    with pytest.raises(Refused, match="at most 3 .*Received: 4"):
        requests.check_prompt("abcd", limits)
    image = picture()
    data = encode(image, "PNG")
    pixels = image.width * image.height
    exact = dataclasses.replace(limits, pixels=pixels)
    assert requests.decode_picture(data, exact).shape == (50, 70, 3)
    with pytest.raises(Refused, match=f"at most {pixels - 1:,}") as caught:
        requests.open_picture(data, Limits(pixels=pixels - 1))
    assert caught.value.status == 413


def test_other_errors_are_not_told():
    known = Refused(429, "later")
    assert Refused.of(known) is known
    hidden = Refused.of(OSError("/home/secret"))
    assert hidden.status == 500 and not re.search("secret", str(hidden))


def test_sizes_of_batches():
    assert requests.power_of_two(8) == 8
    assert requests.sizes(8) == [1, 2, 4, 8]
    for wrong in (0, -2, 3, 6):
        with pytest.raises(ValueError, match="power of two"):
            requests.power_of_two(wrong)


def test_choices_of_copies():
    assert requests.with_seed(Choice(), 3).seed is None
    assert requests.with_seed(Choice(seed=5), 3).seed == 8
    assert requests.with_seed(Choice(seed=2**31 - 1), 1).seed == 0
    assert Choice().length(7) == Choice(max_new_tokens=9).length(7) == 7
    assert Choice(max_new_tokens=3).length(7) == 3
