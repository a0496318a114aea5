"""Writing the answers to many pictures to a file: resuming and errors."""

import json
import os
import types
import warnings

import keras_hub
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import compat
from keras_paligemma.cli import app
from keras_paligemma.evaluation import predictions
from keras_paligemma.evaluation import run_record
from keras_paligemma.evaluation.answer_file import answer_file
from keras_paligemma.evaluation.answer_file import open_pictures
from tests.helpers.text_models import build_tiny_model
from tests.helpers.text_models import tiny_preprocessor


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


class Echo:
    """A stand-in for a model, which answers with the prompts."""

    def __init__(self, weight=0.0):
        self.preprocessor = tiny_preprocessor()
        self.sampler = keras_hub.samplers.GreedySampler()
        self.backbone = types.SimpleNamespace(
            vocabulary_size=2048,
            image_size=28,
            compute_dtype="float32",
            weights=[np.array([weight])],
        )
        self.calls = []

    def generate(self, inputs, max_new_tokens, **options):
        self.preprocessor.generate_preprocess(
            inputs, max_new_tokens=max_new_tokens
        )
        self.calls.append(options)
        return list(inputs["prompts"])


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
        ({"max_new_tokens": 0}, "^`max_new_tokens` must be an integer"),
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
    with pytest.warns(UserWarning, match="1 pictures have no answer.*b.jpg"):
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


def write_list(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_list_that_has_grown_is_gone_on_with(folder, tmp_path):
    rows = [{"image": name, "prefix": name} for name in ("a.png", "b.jpg")]
    data, path = folder / "list.jsonl", tmp_path / "answers.jsonl"
    for count in (1, 2):
        pictures = open_pictures(write_list(data, *rows[:count]))
        answer_file(Echo(), pictures, path, batch_size=1)
    assert rows_of(path) == {"1": "a.png", "2": "b.jpg"}
    # Rows that have no answer yet may change.
    rows += [{"image": "d.png", "prefix": "ocr"}]
    model = Echo()
    pictures = open_pictures(write_list(data, *rows))
    answer_file(model, pictures, path, batch_size=1)
    assert len(model.calls) == 1


def test_two_runs_do_not_write_one_file(folder, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    pictures = open_pictures(folder, "ocr")
    path = tmp_path / "answers.jsonl"
    second = []

    class Slow(Echo):
        def generate(self, inputs, max_new_tokens, **options):
            # Another process has its own open file, as this call has.
            with pytest.raises(ValueError, match="answers.jsonl is in use"):
                answer_file(Echo(), pictures, path)
            second.append(path.read_bytes())
            return super().generate(inputs, max_new_tokens, **options)

    answer_file(Slow(), pictures, path, batch_size=2)
    assert second[0] == b"" and len(second) == 3
    assert list(rows_of(path)) == pictures.ids
    # The lock has ended, and file systems without locks are written to.
    with pytest.MonkeyPatch.context() as patch:

        def no_locks(file, kind):
            raise OSError(95, "Operation not supported")

        patch.setattr(fcntl, "flock", no_locks)
        answer_file(Echo(), pictures, path, batch_size=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": "caption en"}, "id '2'.*prompt 'ocr', now 'caption en'"),
        ({"image": "d.png"}, "id '2'.*image '.*b.jpg', now '.*d.png'"),
        ({"beams": 3}, "beams None, now 3"),
        ({"max_new_tokens": 5}, "max_new_tokens 8, now 5"),
        ({"weight": 1.0}, "model_sha256"),
        ({"resize": "bicubic"}, "resize 'bilinear', now 'bicubic'"),
    ],
)
def test_rows_of_another_call_are_refused(folder, tmp_path, change, message):
    path, data = tmp_path / "answers.jsonl", folder / "list.jsonl"
    first = {"image": "a.png", "prefix": "ocr"}
    second = {"image": "b.jpg", "prefix": "ocr"}
    pictures = open_pictures(write_list(data, first, second))
    answer_file(Echo(), pictures, path)
    kept = path.read_bytes()
    options, model = dict(change), Echo(change.get("weight", 0.0))
    options.pop("weight", None)
    if "resize" in options:
        model.preprocessor.image_converter.resize = options.pop("resize")
    for name in ("image", "prefix"):
        second[name] = options.pop(name, second[name])
    pictures = open_pictures(write_list(data, first, second))
    with pytest.raises(ValueError, match=f"rows of another run.*{message}"):
        answer_file(model, pictures, path, **options)
    assert path.read_bytes() == kept
    # As told: without the file, the same call begins.
    path.unlink()
    answer_file(model, pictures, path, **options)
    assert len(model.calls) == 1


def test_a_change_of_a_large_weight_alone_is_noticed(model, monkeypatch):
    """As by an adapter that was merged: norms and biases stay."""
    monkeypatch.setattr(run_record, "_SMALL", 64)
    before = run_record.fingerprint(model)
    for weight in model.backbone.weights:
        if np.prod(weight.shape) > 64:
            kept = compat.to_host(weight)
            weight.assign(kept + 0.25)
            assert run_record.fingerprint(model) != before, weight.path
            weight.assign(kept)
    assert run_record.fingerprint(model) == before


def test_an_output_without_its_record_is_refused(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    pictures = open_pictures(folder, "ocr")
    answer_file(Echo(), pictures, path)
    (tmp_path / "answers.jsonl.run.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="run.json is no record of a run"):
        answer_file(Echo(), pictures, path)
    (tmp_path / "answers.jsonl.run.json").unlink()
    with pytest.raises(ValueError, match="earlier version.*run.json beside"):
        answer_file(Echo(), pictures, path)
    path.write_bytes(b"")
    answer_file(Echo(), pictures, path)
    assert len(rows_of(path)) == 5


def test_killed_at_any_length_of_the_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    path, pictures = tmp_path / "answers.jsonl", open_pictures(folder, "ocr")
    answer_file(Echo(), pictures, path, batch_size=2)
    whole = path.read_bytes()
    other = open_pictures(folder, "caption en")
    first = whole.index(b"\n") + 1
    for length in (0, 1, 9, first - 1, first, first + 9, len(whole) - 1):
        path.write_bytes(whole[:length])
        if length >= first:  # Else there is no row of any prompt.
            with pytest.raises(ValueError, match="rows of another run"):
                answer_file(Echo(), other, path, batch_size=2)
            assert path.read_bytes() == whole[:length]
        answer_file(Echo(), pictures, path, batch_size=2)
        assert path.read_bytes() == whole


def test_what_the_call_did_not_write_is_not_erased(folder, tmp_path):
    path, pictures = tmp_path / "config.json", open_pictures(folder, "ocr")
    row = b'{"id": "a.png", "prediction": ""}\n'
    for text in (
        b'{"precious": true}',
        b'{"id": "b.png", "prediction": "',
        row + b'{"id": "a.png", "prediction": "',
        row + b"notes",
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="no row of this run.*Choose"):
            answer_file(Echo(), pictures, path)
        assert path.read_bytes() == text


@pytest.mark.parametrize("suffix", ["", ".errors.jsonl", ".run.json"])
def test_the_data_is_no_output(folder, suffix):
    data = folder / f"list{suffix}"
    data.write_text('{"image": "a.png", "prefix": "ocr"}')
    kept = data.read_bytes()
    with pytest.raises(ValueError, match="would overwrite the data"):
        answer_file(Echo(), open_pictures(data), folder / "list")
    assert data.read_bytes() == kept


def test_names_that_are_no_utf8_are_listed(folder, tmp_path):
    id = os.fsdecode(b"caf\xe9.png")
    (folder / id).write_bytes(b"damaged")
    path = tmp_path / "answers.jsonl"
    pictures = open_pictures(folder, "ocr")
    with pytest.warns(UserWarning, match="1 pictures"):
        assert answer_file(Echo(), pictures, path) == 1
    assert answer_file(Echo(), pictures, path) == 0
    listed = tmp_path / "answers.jsonl.errors.jsonl"
    assert json.loads(listed.read_text("utf-8"))["id"] == id
    assert rows_of(path)[id] == "" and len(rows_of(path)) == 6


def test_half_a_character_in_a_prompt_is_listed(folder, tmp_path):
    rows = [{"image": "a.png", "prefix": p} for p in ("ocr", "b\ud800")]
    pictures = open_pictures(write_list(folder / "list.jsonl", *rows))
    path = tmp_path / "answers.jsonl"
    with pytest.warns(UserWarning, match="id '2'"):
        assert answer_file(Echo(), pictures, path) == 1
    assert rows_of(path) == {"1": "ocr", "2": ""}


def test_an_error_is_listed_once(folder, tmp_path, monkeypatch):
    """Kill a call between the list of errors and the answers."""
    (folder / "b.jpg").write_bytes(b"damaged")
    path, pictures = tmp_path / "answers.jsonl", open_pictures(folder, "ocr")
    listed = tmp_path / "answers.jsonl.errors.jsonl"

    def kill(path, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predictions, "append", kill)
        answer_file(Echo(), pictures, path, batch_size=2)
    lines = listed.read_bytes()
    listed.write_bytes(lines + lines[:20])
    with pytest.warns(UserWarning, match="1 pictures"):
        answer_file(Echo(), pictures, path, batch_size=2)
    assert listed.read_bytes() == lines
    answer_file(Echo(), pictures, path, batch_size=2)
    assert listed.read_bytes() == lines
    # Read now, it is listed no longer.
    Image.new("RGB", (9, 9)).save(folder / "b.jpg")
    path.unlink()
    assert answer_file(Echo(), pictures, path) == 0
    assert listed.read_bytes() == b""


def test_the_command_counts_the_errors_of_all_its_calls(folder, monkeypatch):
    """The second call reads nothing again, and its paths are of the home."""
    monkeypatch.setattr(PaliGemmaCausalLM, "from_preset", lambda name: Echo())
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    (folder / "b.jpg").write_bytes(b"damaged")
    arguments = ["generate", "--preset", "any", "--prompt", "ocr"]
    arguments += ["--data=~/photos", "--output=~/answers.jsonl"]
    for _ in range(2):
        with warnings.catch_warnings(action="ignore"):
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.output == (
            f"4 of 5 in {folder.parent / 'answers.jsonl'}\n"
        )
        assert not result.exit_code
    assert not (folder / "~").exists()


def test_the_command_fails_if_nothing_was_answered(tmp_path, monkeypatch):
    """A script that goes on would use a file of empty answers."""
    monkeypatch.setattr(PaliGemmaCausalLM, "from_preset", lambda name: Echo())
    (tmp_path / "a.png").write_bytes(b"damaged")
    output = tmp_path / "answers.jsonl"
    arguments = ["generate", "--preset", "any", "--prompt", "ocr"]
    arguments += [f"--data={tmp_path}", f"--output={output}"]
    for _ in range(2):
        with warnings.catch_warnings(action="ignore"):
            result = CliRunner().invoke(app, arguments)
        assert result.output == f"0 of 1 in {output}\n"
        assert result.exit_code == 1


@pytest.mark.parametrize("output", ["gs://bucket/answers.jsonl", ""])
def test_the_output_is_a_local_file(folder, monkeypatch, output):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match="path of this machine"):
        answer_file(Echo(), open_pictures(folder, "ocr"), output)
    assert sorted(os.listdir()) == before


def test_another_list_than_that_of_errors_is_kept(folder, tmp_path):
    listed = tmp_path / "answers.jsonl.errors.jsonl"
    for text in ('{"id": "a.png"}\n', "notes"):
        listed.write_text(text)
        with pytest.raises(ValueError, match="no errors of pictures"):
            answer_file(
                Echo(), open_pictures(folder, "ocr"), tmp_path / "answers.jsonl"
            )
        assert listed.read_text() == text


def test_two_hosts_keep_a_record_of_each_file(folder, tmp_path, monkeypatch):
    (folder / "more" / "e.webp").write_bytes(b"damaged")
    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr(compat, "wait_for_all", lambda place: None)
    monkeypatch.setattr(compat, "least", lambda value: value)

    def run(prompt, indices=(1, 0)):
        unread = 0
        for index in indices:
            place = (index, 2)
            monkeypatch.setattr(compat, "process", lambda at=place: at)
            echo = Echo()
            unread += answer_file(
                echo,
                open_pictures(folder, prompt),
                path,
                batch_size=2,
                shard=(index, 2),
            )
            calls.append(len(echo.calls))
        return unread

    calls = []

    with pytest.warns(UserWarning, match="1 pictures"):
        assert run("ocr") == 1
    # Each host waits for the other, so both run both batches.
    assert calls == [2, 2]
    # The other host fills its batch with the same picture.
    listed = tmp_path / "answers.jsonl.errors.jsonl"
    assert len(listed.read_text().splitlines()) == 1
    assert list(rows_of(path).values()) == ["ocr"] * 4 + [""]
    for name in ("answers.jsonl", "answers-0-of-2.jsonl"):
        with pytest.raises(ValueError, match=f"{name} holds rows of another"):
            run("caption en", [0])
        (tmp_path / name).unlink()
    (tmp_path / "answers-1-of-2.jsonl").unlink()
    # A file of one host alone, which is not whole, is no end of the run.
    with pytest.warns(UserWarning, match="1 pictures"):
        run("caption en")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    assert run("caption en") == 0
    assert path.read_bytes() == b"".join(lines)


def test_samples_do_not_depend_on_the_batch(model, folder, tmp_path):
    same = [{"image": "a.png", "prefix": "ocr"}] * 6
    pictures = open_pictures(write_list(folder / "list.jsonl", *same))
    # A seed whose product with a number exceeds 32 bits.
    how = {"temperature": 9.0, "seed": 3000, "max_new_tokens": 4}
    found = []
    for size in (2, 3):
        path = tmp_path / f"{size}.jsonl"
        answer_file(model, pictures, path, batch_size=size, **how)
        found.append(rows_of(path))
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 4
    inputs = {"images": [pictures.images[0]] * 6, "prompts": ["ocr"] * 6}
    whole = model.generate(inputs, batch_size=3, **how)
    assert list(found[0].values()) == whole


def test_lists_of_options_have_one_value_per_picture(folder, tmp_path):
    model, pictures = Echo(), open_pictures(folder, "ocr")
    path = tmp_path / "answers.jsonl"
    how = {"temperature": [1.0, 2.0, 3.0, 4.0, 5.0], "seed": [5, 4, 3, 2, 1]}
    answer_file(model, pictures, path, batch_size=2, **how)
    assert [call["seed"] for call in model.calls] == [[5, 4], [3, 2], [1, 1]]
    assert model.calls[1]["temperature"] == [3.0, 4.0]
    with pytest.raises(ValueError, match="Expected: a number, or 5"):
        answer_file(model, pictures, path, seed=[1, 2])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "^`batch_size` must be an integer.*Received: 0"),
        ({"batch_size": -1}, "^`batch_size` must be an integer.*Received: -1"),
        (
            {"batch_size": True},
            "^`batch_size` must be an integer.*Received: True",
        ),
        ({"num_samples": 2}, "one answer per picture.*num_samples=2"),
    ],
)
def test_options_that_give_no_file(folder, tmp_path, option, message):
    path = tmp_path / "new" / "answers.jsonl"
    with pytest.raises(ValueError, match=message):
        answer_file(Echo(), open_pictures(folder, "ocr"), path, **option)
    assert not path.parent.exists()


def test_null_is_a_missing_field(folder):
    rows = [
        {"image": "a.png", "prefix": None, "id": None},
        {"image": "b.jpg", "prefix": "ocr", "id": None},
    ]
    file = write_list(folder / "list.jsonl", *rows)
    pictures = open_pictures(file, "caption en")
    assert pictures.ids == ["1", "2"]
    assert pictures.prompts == ["caption en", "ocr"]
    with pytest.raises(ValueError, match="'1' is not said"):
        open_pictures(file)
    with pytest.raises(ValueError, match="line 1 names no picture"):
        open_pictures(write_list(file, {"image": None}), "ocr")


def test_frames_are_relative_to_their_list(folder):
    row = {"image": ["a.png", str(folder / "b.jpg")], "prefix": "ocr"}
    pictures = open_pictures(write_list(folder / "list.jsonl", row))
    assert pictures.images == [[str(folder / "a.png"), str(folder / "b.jpg")]]


def test_homes_of_unknown_users_do_not_exist():
    with pytest.raises(ValueError, match="~nobody_of_this_name"):
        open_pictures("~nobody_of_this_name/a", "ocr")
