"""JSONL: every bad line is reported by number, and no text is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data import Batches
from keras_paligemma.data import ExampleError
from keras_paligemma.data import JSONLSource
from keras_paligemma.data import check
from keras_paligemma.data import jsonl

GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "a cat"}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes lines to a file, and pictures beside it."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(
        (tmp_path / "a.png").read_bytes()[:70]
    )

    def write(*lines, end="\n"):
        lines = [x if isinstance(x, str) else json.dumps(x) for x in lines]
        path = tmp_path / "train.jsonl"
        path.write_bytes((end.join(lines) + end).encode())
        return path

    return write


def test_examples_and_places(write):
    path = write(
        GOOD, "", GOOD | {"image": ["a.png", "/b.png"], "suffix": ["x", "é"]}
    )
    source = JSONLSource(path)
    assert len(source) == 2
    assert list(source) == [
        {
            "images": str(path.parent / "a.png"),
            "prompts": "caption en",
            "responses": "a cat",
        },
        {
            "images": [str(path.parent / "a.png"), "/b.png"],
            "prompts": "caption en",
            "responses": ["x", "é"],
        },
    ]
    assert source.where(1) == f"{path}, line 3"
    elsewhere = JSONLSource(path, image_folder="pictures")
    assert elsewhere[0]["images"] == "pictures/a.png"
    windows = JSONLSource(write(GOOD | {"image": "cats\\a.png"}))
    assert windows[0]["images"] == str(path.parent / "cats" / "a.png")
    uri = "data:image/png;base64,AA"
    assert JSONLSource(write(GOOD | {"image": uri}))[0]["images"] == uri


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends(write, end):
    path = write("\ufeff" + json.dumps(GOOD), "", GOOD, "7", end=end)
    whole = JSONLSource(path)
    path.write_bytes(path.read_bytes().removesuffix(end.encode()))
    for source in (whole, JSONLSource(path)):
        assert source.lines.tolist() == [0, 2, 3]
        assert source[0] == source[1]
        with pytest.raises(ExampleError, match="line 4: A field is missing"):
            source[2]


@pytest.mark.parametrize("chunk", [1, 7, 2**24])
def test_blank_lines_are_passed_over(write, monkeypatch, chunk):
    monkeypatch.setattr(jsonl, "_CHUNK", chunk)
    indented = "  " + json.dumps(GOOD)
    source = JSONLSource(
        write("   ", GOOD, "\t \t\r", indented, "", " " * 99, GOOD, "    ")
    )
    assert source.lines.tolist() == [1, 3, 6]
    assert source[0] == source[1] == source[2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'image': 1}", "The line is not JSON"),
        (json.dumps(GOOD)[:-4], "The line is not JSON"),
        ("{" + '"a":{' * 100_000, "The line is not JSON: its brackets"),
        ("[1, 2]", "A field is missing"),
        ({"image": "a.png", "prefix": ""}, "A field is missing"),
        (GOOD | {"suffix": ""}, "`suffix` is empty"),
        (GOOD | {"suffix": ["a", " "]}, "`suffix` is empty"),
        (GOOD | {"suffix": []}, "`suffix` is not text"),
        (GOOD | {"suffix": 3}, "`suffix` is not text"),
        (GOOD | {"prefix": None}, "`prefix` is not text"),
        (GOOD | {"image": None}, "`image` is not text"),
    ],
)
def test_bad_lines(write, line, message):
    source = JSONLSource(write(GOOD, line))
    assert source[0]["responses"] == "a cat"
    with pytest.raises(ExampleError, match=f"train.jsonl, line 2: {message}"):
        source[1]


@pytest.mark.parametrize(
    "token", ["<loc1024>", "<loc-001>", "<loc12>", "<loc00500>", "<seg128>"]
)
def test_places_outside_of_the_picture(write, token):
    """Such locations are not tokens, and would be learned as plain text."""
    box = "<loc0000><loc0000><loc1023>"
    fine = GOOD | {"suffix": f"{box}<loc1019> a <local> cat <seg000><seg127>"}
    source = JSONLSource(write(fine, fine | {"suffix": f"{box}{token} cat"}))
    (problem,) = check(source)
    assert "train.jsonl, line 2: A place or mask is outside" in problem
    assert token in problem
    source = JSONLSource(write(fine | {"suffix": ["a cat", f"{token} cat"]}))
    with pytest.raises(ExampleError, match="line 1: A place or mask"):
        next(iter(Batches(source, lambda example: ({}, 0, 0), 1)))


@pytest.mark.parametrize(
    "y1, x1, y2, x2", [(8, 1, 2, 3), (2, 8, 5, 3), (1023, 1023, 0, 0)]
)
def test_boxes_upside_down(write, y1, x1, y2, x2):
    box = "".join(f"<loc{edge:04}>" for edge in (y1, x1, y2, x2))
    point = "<loc0900><loc0001> cat"
    fine = "<loc0002><loc0001><loc0002><loc0009><seg001> cat"
    source = JSONLSource(
        write(
            GOOD | {"suffix": f"{fine} ; {point}"},
            GOOD | {"suffix": f"{fine} ; {box} dog"},
            GOOD | {"suffix": f"<seg001>{box} dog"},
        )
    )
    for line, problem in zip((2, 3), check(source), strict=True):
        assert f"line {line}: A box is upside down" in problem
        assert box in problem


LOCATION = "<loc0100>"
BOX = "<loc0100><loc0200><loc0300><loc0400>"
MASK = "<seg007>" * 16


@pytest.mark.parametrize("task", ["detect", "segment", "<image>Detect"])
@pytest.mark.parametrize(
    "answer, received",
    [
        (LOCATION * 3, "3 <loc…>, 0 <seg…> in"),
        (LOCATION * 5, "5 <loc…>, 0 <seg…> in"),
        (BOX.replace("><", "> <"), "4 <loc…>, 0 <seg…> and blanks in"),
        (BOX + MASK[8:], "4 <loc…>, 15 <seg…> in"),
        (f"{BOX} {MASK}", "4 <loc…>, 16 <seg…> and blanks in"),
        (f"{BOX}{MASK} cat ; {MASK}", "0 <loc…>, 16 <seg…> in"),
        (f"{BOX} cat ; {LOCATION}", "1 <loc…>, 0 <seg…> in"),
    ],
)
def test_objects_of_too_many_or_few_tokens(write, task, answer, received):
    line = {"image": "a.png", "prefix": f"{task} cat ; dog"}
    fine = [
        line | {"suffix": suffix} for suffix in (f"{BOX} cat", f"{BOX}{MASK} a")
    ]
    source = JSONLSource(write(*fine, line | {"suffix": f"{answer} cat"}))
    (problem,) = check(source)
    assert "train.jsonl, line 3: An object is neither a box" in problem
    assert "4 <loc…> and 16 <seg…>" in problem and received in problem
    # Other tasks have their own formats, such as points.
    assert not check(JSONLSource(write(GOOD | {"suffix": f"{answer} cat"})))


FRAMES = [GOOD | {"image": image} for image in ("a.png", ["a.png"])]
PAIR = GOOD | {"image": ["a.png", "a.png"]}


def stack(example):
    """Stack arrays as a preprocessor makes them of a picture or of frames."""
    images = np.array(example["images"])
    pixels = np.ones((*images.shape, 2, 2, 3), "float32")
    return {"images": pixels}, np.ones(3, "int32"), np.ones(3, "float32")


def test_numbers_of_frames_that_differ(write):
    """Mismatched frames are reported or skipped; one frame is a picture."""
    source = JSONLSource(write(*FRAMES, PAIR, GOOD))
    (problem,) = check(source)
    assert "line 3: The example has 2 frames, and" in problem
    assert "line 1 has 1" in problem
    kwargs = {"shuffle": False, "epochs": 1}
    message = r"line 3: .*no batch with .*line 1: .*\(2, 2, 2, 3\)"
    with pytest.raises(ExampleError, match=message):
        list(Batches(source, stack, 2, **kwargs))
    batches = Batches(source, stack, 2, skip_errors=True, **kwargs)
    with pytest.warns(UserWarning, match="skipped so far: 1.*line 3"):
        rows = [(x["images"].shape, weights) for x, _, weights in batches]
    assert [shape for shape, _ in rows] == [(2, 2, 2, 3)] * 2
    assert [w[:, 0].tolist() for _, w in rows] == [[1, 1], [0, 1]]
    # The first line decides, whichever batch is read.
    source = JSONLSource(write(PAIR, PAIR, PAIR, GOOD, PAIR))
    assert ["line 4" in problem for problem in check(source)] == [True]
    batches = Batches(source, stack, 1, skip_errors=True, **kwargs)
    batches.set_state(batches.get_state(3))
    with pytest.warns(UserWarning, match="line 4"):
        assert [x["images"].shape for x, _, _ in batches] == [
            (1, 2, 2, 2, 3)
        ] * 2
    empty = JSONLSource(write(GOOD | {"image": []}))
    assert "line 1: `image` is not text" in check(empty)[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_told_in_one_sentence(tmp_path, encoding, indent):
    path = tmp_path / "array.jsonl"
    path.write_text("\n" + json.dumps([GOOD] * 3, indent=indent), encoding)
    with pytest.raises(ValueError, match=r"array.jsonl is one JSON array.*jq"):
        JSONLSource(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_in_one_sentence(tmp_path, encoding):
    path = tmp_path / "wide.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", encoding)
    with pytest.raises(ValueError, match="wide.jsonl is UTF-16.*UTF-8"):
        JSONLSource(path)


def test_objects_of_several_lines_are_told_in_one_sentence(write):
    pretty = json.dumps(GOOD, indent=2)
    for text in (pretty, "\ufeff" + pretty, f"{pretty}\n{pretty}"):
        with pytest.raises(ValueError, match="several lines an object.*jq"):
            JSONLSource(write(text))
    # A truncated line is reported once.
    cut = json.dumps(GOOD)[:-1]
    assert len(check(JSONLSource(write(cut, GOOD)))) == 1
    assert len(check(JSONLSource(write(cut)))) == 1


def test_empty_answers_on_request(write):
    source = JSONLSource(write(GOOD | {"suffix": ""}), allow_empty=True)
    assert source[0]["responses"] == ""


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist.*none.jsonl"):
        JSONLSource(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert len(JSONLSource(tmp_path / "empty.jsonl")) == 0


def test_check_tells_all_at_once(write):
    source = JSONLSource(
        write(
            GOOD,
            "no json",
            GOOD | {"image": "none.png"},
            GOOD | {"image": "broken.png"},
            GOOD | {"suffix": ["fine", "much too long"]},
        )
    )
    problems = check(source)
    assert [problem.split("line ")[1][:3] for problem in problems] == [
        "2: ",
        "3: ",
        "4: ",
    ]
    assert "none.png" in problems[1] and "No such file" in problems[1]
    assert "broken.png" in problems[2] and "could not be read" in problems[2]

    def preprocessor(example):
        assert example["images"].shape == (4, 5, 3)
        if len(example["responses"]) > 5:
            raise ValueError("too long")

    assert check(source, preprocessor)[3].endswith("line 5: too long")


def test_check_tells_typed_special_tokens(write):
    """Tokens before a prompt are not reported, since nothing is lost."""
    source = JSONLSource(
        write(
            GOOD | {"prefix": "<image>detect cat"},
            GOOD,
            GOOD | {"prefix": "detect <image> cat"},
            GOOD | {"suffix": ["a cat", "a cat<eos>"]},
        )
    )
    second, third = check(source)
    assert "line 3" in second and "<image> at character 7" in second
    assert "line 4" in third and "`responses`" in third
    assert "<eos> at character 5" in third


def test_memory_does_not_grow_with_text(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps(GOOD | {"suffix": "word " * 40})
    with open(path, "w") as file:
        for number in range(200_000):
            file.write(f"{line[:-2]}{number}{line[-2:]}\n")
    source = JSONLSource(path)
    assert len(source) == 200_000
    assert path.stat().st_size > 48_000_000
    held = [x for x in vars(source).values() if isinstance(x, np.ndarray)]
    assert sum((x if x.base is None else x.base).nbytes for x in held) == (
        200_000 * 16
    )
    for number in (0, 77_777, 199_999):
        assert source[number]["responses"].split()[-1] == str(number)


def test_a_first_line_of_deep_brackets(write):
    """It is reported as a line, not as a file of another kind."""
    source = JSONLSource(write("{" + '"a":{' * 100_000, GOOD))
    with pytest.raises(ExampleError, match="line 1: The line is not JSON"):
        source[0]
    assert source[1]["responses"] == "a cat"
