"""The scripts of `examples` run with the nano preset and give their results."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.data import convert
from tests.helpers.processes import LEAN
from tests.helpers.tiny_models import PRESETS

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = EXAMPLES / "pictures"
LINES = EXAMPLES / "finetune" / "train.jsonl"


def run(script, *arguments):
    """Run a script in this process, which has already imported the package."""
    main = runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"]
    main([str(argument) for argument in arguments])


def test_caption_a_folder_and_go_on(tmp_path):
    output = tmp_path / "captions.jsonl"
    done = {"image": str(PICTURES / "chelsea.jpg"), "suffix": "a cat"}
    output.write_text(json.dumps(done) + "\n")
    run("caption_folder", PICTURES, output, "--batch-size", 3)
    lines = output.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    captions = {Path(row["image"]).name: row["suffix"] for row in rows}
    assert len(rows) == 6 and captions["chelsea.jpg"] == "a cat"
    assert captions["scene_1.png"] == "a bell"
    # The last line is cut by a kill.
    output.write_text("".join(lines[:-1]) + lines[-1][:-9])
    run("caption_folder", PICTURES, output)
    assert output.read_text() == "".join(lines)
    with pytest.raises(SystemExit):
        run("caption_folder", PICTURES, output, "--prompt", "caption de")
    with pytest.raises(SystemExit):
        run("caption_folder", tmp_path / "none", output)
    (tmp_path / "notes").write_text("no line end")
    with pytest.raises(SystemExit):
        run("caption_folder", PICTURES, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "no line end"


def test_caption_a_folder_with_a_broken_picture(tmp_path, capsys):
    """Each picture that can be read has a caption, and the others a line."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    shutil.copy(PICTURES / "scene_1.png", pictures)
    for name in ("a.png", "z.png"):
        (pictures / name).write_text("no picture")
    output = tmp_path / "captions.jsonl"
    for _ in range(2):
        run("caption_folder", pictures, output, "--batch-size", 1)
        (line,) = output.read_text().splitlines()
        assert json.loads(line)["suffix"] == "a bell"
        printed = capsys.readouterr().err
        assert printed.count("could not be read") == 2
        assert "a.png" in printed and "z.png" in printed


class Parrot:
    """A stand-in for a model, which answers with the name of the picture."""

    preprocessor = None

    @classmethod
    def from_preset(cls, *args, **kwargs):
        return cls()

    def generate(self, inputs, batch_size):
        assert all(text.startswith("detect") for text in inputs["prompts"])
        return [""] * len(inputs["images"])

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.any_backend
def test_captions_of_files_whose_names_are_no_utf_8(tmp_path, monkeypatch):
    """As old archives unpack them; each call ended at the first."""
    monkeypatch.setattr("keras_paligemma.PaliGemmaCausalLM", Parrot)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(PICTURES / "scene_1.png", pictures / name)
    output = tmp_path / "captions.jsonl"
    for _ in range(2):
        run("caption_folder", pictures, output, "--prompt", "detect bell")
        (row,) = map(json.loads, output.read_text("utf-8").splitlines())
        assert row["image"] == str(pictures / name)


@pytest.mark.parametrize(
    "text", ["\n", "[1]\n", '{"a": 1}\n', "two\nlines\n"], ids=repr
)
def test_captions_are_not_added_to_another_file(tmp_path, capsys, text):
    output = tmp_path / "notes"
    output.write_text(text)
    with pytest.raises(SystemExit):
        run("caption_folder", PICTURES, output)
    assert "is another file" in capsys.readouterr().err
    assert output.read_text() == text


def test_captions_in_batches_of_none(tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    with pytest.raises(SystemExit):
        run("caption_folder", PICTURES, output, "--batch-size", -1)
    assert "--batch-size is at least 1" in capsys.readouterr().err
    assert not output.exists()


def test_a_ray_worker_captions_a_batch():
    """Run without a cluster, which only slow tests start."""
    pytest.importorskip("ray")
    worker = runpy.run_path(str(EXAMPLES / "ray_captions.py"))["Captions"]
    names = ("scene_1.png", "scene_2.png")
    batch = {
        "path": [*names],
        "bytes": [(PICTURES / n).read_bytes() for n in names],
    }
    captions = worker("pali_gemma2_nano_112", "caption en", 4)
    found = captions(batch)
    assert found["image"] == [*names]
    assert found["suffix"] == ["a bell", "a guitar and a snail"]
    # A broken picture is none of the others' concern.
    batch["bytes"][0] = b"no picture"
    assert captions(batch)["image"] == ["scene_2.png"]
    batch["bytes"][1] = b"no picture"
    assert captions(batch) == {"image": [], "suffix": []}


def test_ray_adds_no_captions_to_others(tmp_path, capsys):
    pytest.importorskip("ray")
    (tmp_path / "1.json").touch()
    with pytest.raises(SystemExit):
        run("ray_captions", PICTURES, tmp_path)
    assert "is in use" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.any_backend
def test_caption_on_a_ray_cluster(tmp_path):
    """Two nodes run models; a third one, the head, reads and writes."""
    pytest.importorskip("ray")
    pictures, output = tmp_path / "pictures", tmp_path / "captions"
    shutil.copytree(PICTURES, pictures)
    for name in ("a.png", "b.png"):
        (pictures / name).write_text("no picture")
    # Ray's datasets need pandas.
    environment = LEAN | {"HIDDEN_PACKAGES": "tensorflow matplotlib"}
    subprocess.run(
        [sys.executable, EXAMPLES.parent / "tests" / "ray_cluster.py"]
        + [EXAMPLES / "ray_captions.py", pictures, output]
        + ["--workers", "2", "--batch-size", "2"],
        env=os.environ | environment | {"KERAS_BACKEND": "jax"},
        check=True,
        timeout=600,
    )
    rows = [
        json.loads(line)
        for file in output.glob("*.json")
        for line in file.read_text("utf-8").splitlines()
    ]
    captions = {Path(row["image"]).name: row["suffix"] for row in rows}
    assert len(rows) == 6 == len(captions)
    assert captions["scene_1.png"] == "a bell"


def write_coco(path):
    """Write the boxes of the scenes as a COCO file."""
    scenes = json.loads((PICTURES / "scenes.json").read_text())
    names = sorted({o["label"] for s in scenes.values() for o in s["objects"]})
    annotations = [
        {
            "id": f"{number} {place}",
            "image_id": number,
            "category_id": names.index(item["label"]),
            "bbox": [left, top, right - left, bottom - top],
        }
        for number, scene in enumerate(scenes.values())
        for place, item in enumerate(scene["objects"])
        for top, left, bottom, right in [item["box"]]
    ]
    coco = {
        "images": [
            {"id": number, "file_name": name, "height": 112, "width": 112}
            for number, name in enumerate(scenes)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(coco))


def test_fine_tune_on_coco(tmp_path, capsys):
    path = tmp_path / "instances.json"
    write_coco(path)
    options = ("--epochs", 2, "--batch-size", 4, "--learning-rate", 1e-3)
    options += ("--response-length", 40)
    run("finetune_coco", path, PICTURES, tmp_path / "run", *options)
    assert "5 examples" in capsys.readouterr().out
    assert (tmp_path / "run" / "samples" / "epoch_0002.png").exists()
    model = PaliGemmaCausalLM.from_preset("pali_gemma2_nano_112")
    model.load_adapter(tmp_path / "run" / "adapter")


def test_an_unreadable_picture_does_not_end_an_epoch(tmp_path):
    """It is the first one, of those that are drawn after each epoch."""
    write_coco(tmp_path / "instances.json")
    pictures = tmp_path / "pictures"
    shutil.copytree(PICTURES, pictures)
    (pictures / "scene_0.png").write_text("no picture")
    options = ("--epochs", 1, "--batch-size", 4, "--response-length", 40)
    with pytest.warns(UserWarning, match="scene_0.png"):
        run(
            "finetune_coco",
            *(tmp_path / "instances.json", pictures, tmp_path / "run"),
            *options,
        )
    assert (tmp_path / "run" / "samples" / "epoch_0001.png").exists()


def test_unreadable_pictures_of_validation_are_told_at_once(tmp_path, capsys):
    write_coco(tmp_path / "instances.json")
    yolo = tmp_path / "yolo"
    convert(tmp_path / "instances.json", yolo, "yolo", PICTURES)
    for name in ("scene_0.png", "scene_2.png"):
        (yolo / "images" / name).unlink()
        (yolo / "images" / name).write_text("no picture")
    with pytest.raises(SystemExit):
        run("finetune_yolo", yolo, tmp_path / "run")
    printed = capsys.readouterr().err
    assert "scene_0.png" in printed and "scene_2.png" in printed


def test_fine_tune_on_yolo(tmp_path, capsys):
    write_coco(tmp_path / "instances.json")
    yolo = tmp_path / "yolo"
    convert(tmp_path / "instances.json", yolo, "yolo", PICTURES)
    options = ("--epochs", 1, "--batch-size", 4, "--response-length", 40)
    run("finetune_yolo", yolo, tmp_path / "run", *options)
    printed = capsys.readouterr().out
    assert "5 examples" in printed
    assert "epoch 1: mean average precision 0." in printed
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_qlora(tmp_path, capsys):
    options = ("--epochs", 2, "--learning-rate", 3e-3)
    run("qlora", LINES, tmp_path, *options)
    assert "caption en -> a" in capsys.readouterr().out
    PaliGemmaCausalLM.from_preset(tmp_path / "preset")


def test_distil_answers(tmp_path, capsys):
    """The student learns the teacher's answers, not the file's."""
    rows = [json.loads(line) for line in LINES.read_text().splitlines()]
    asked = [row | {"suffix": "never read"} for row in rows[:3]]
    data = tmp_path / "asked.jsonl"
    for row in asked:
        row["image"] = str(LINES.parent / row["image"])
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    run("distil_answers", data, tmp_path, "--epochs", 1, "--batch-size", 3)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    taught = [json.loads(line) for line in lines]
    assert [row["prefix"] for row in taught] == [row["prefix"] for row in asked]
    assert all(row["suffix"] not in ("", "never read") for row in taught)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    # Answers that are there are not of other questions or another teacher.
    teacher = PRESETS / "pali_gemma2_nano_112"
    for changed, options in ((asked, ("--teacher", teacher)), (asked[:2], ())):
        data.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(SystemExit):
            run("distil_answers", data, tmp_path, *options)
        assert "other questions" in capsys.readouterr().err


@pytest.mark.any_backend
def test_a_teacher_that_finds_nothing_teaches_that(tmp_path, monkeypatch):
    """The lines are read as `JSONLSource` reads them."""
    trained = []
    monkeypatch.setattr("keras_paligemma.PaliGemmaCausalLM", Parrot)
    monkeypatch.setattr(
        "keras_paligemma.data.Batches", lambda *given, **_: given
    )
    monkeypatch.setattr(
        "keras_paligemma.training.fit", lambda *given: trained.append(given)
    )
    address = (PICTURES / "scene_2.png").as_uri()
    images = [str(PICTURES / "scene_1.png"), address, "data:image/png;base64,"]
    images.append(["a.png", "b.png"])
    rows = [{"image": image, "prefix": "detect cat"} for image in images]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "asked.jsonl").write_text(lines, "utf-8-sig")
    for _ in range(2):
        run("distil_answers", tmp_path / "asked.jsonl", tmp_path / "run")
    (_, (first, *_), *_), (_, (source, *_), *_) = trained
    assert [*first] == [*source]
    assert [example["responses"] for example in source] == [""] * 4
    frames = [str(tmp_path / name) for name in images[3]]
    scene = str(PICTURES / "scene_2.png")
    wanted = [images[0], scene, images[2], frames]
    assert [example["images"] for example in source] == wanted
    (tmp_path / "asked.jsonl").write_text(f'{lines}{{"prefix": "detect cat"}}')
    with pytest.raises(ValueError, match="line 5: KeyError: 'image'"):
        run("distil_answers", tmp_path / "asked.jsonl", tmp_path / "run")


def test_multi_host_starts(tmp_path):
    """Run a single host; `tests/sharding` runs two of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    distribution = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "1",
        "KERAS_DISTRIBUTION_PROCESS_ID": "0",
    }
    subprocess.run(
        [sys.executable, EXAMPLES / "multi_host.py", LINES, tmp_path]
        + ["--memory-gib", "1", "--batch-size", "4"],
        env=os.environ | LEAN | distribution | {"KERAS_BACKEND": "jax"},
        check=True,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.any_backend
def test_every_host_has_an_equal_part_of_a_batch(tmp_path, monkeypatch, capsys):
    """A batch of 8 on three hosts was one of 6."""
    monkeypatch.setattr("keras.distribution.initialize", lambda: None)
    monkeypatch.setattr("keras.distribution.set_distribution", lambda _: None)
    monkeypatch.setattr("keras_paligemma.sharding.auto", lambda *_, **__: None)
    monkeypatch.setattr("keras_paligemma.sharding.data_shard", lambda: (1, 3))
    with pytest.raises(SystemExit):
        run("multi_host", LINES, tmp_path, "--preset", "/no/such/preset")
    assert "--batch-size is a multiple of 3" in capsys.readouterr().err
