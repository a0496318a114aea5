import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from keras_paligemma import demo
from keras_paligemma.demo import Sight
from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.tasks import contact_sheet
from keras_paligemma.tasks.objects import Object
from tests.helpers.tiny_models import PRESETS
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION

BOX = "<loc0000><loc0000><loc0512><loc0512>"


class Scripted:
    """A model with known answers that records its batch sizes."""

    def __init__(self):
        self.sizes = []

    def generate(self, inputs):
        self.sizes.append(len(inputs["images"]))
        return [
            self.answer(image, prompt)
            for image, prompt in zip(
                inputs["images"], inputs["prompts"], strict=True
            )
        ]

    def answer(self, image, prompt):
        if prompt == "caption en":
            return f"a {image.stem} and an owl"
        if prompt.startswith("detect "):
            return f"{BOX} {prompt.removeprefix('detect ')}"
        return "2" if image.stem in prompt else "0"


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(["cat", "dog"]):
        pixels = np.full((40 + 30 * i, 60, 3), 100, "uint8")
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "notes.txt").touch()
    return demo.read_pictures(folder)


@pytest.fixture(scope="module")
def tiny():
    """Return a small random model with the nano preset's tokenizer."""
    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma import PaliGemmaCausalLM
    from keras_paligemma import PaliGemmaCausalLMPreprocessor
    from keras_paligemma import PaliGemmaImageConverter
    from keras_paligemma import PaliGemmaTokenizer

    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(str(PRESETS / demo.NANO / "tokenizer.model")),
        PaliGemmaImageConverter(28),
        prompt_length=16,
        response_length=16,
    )
    backbone = PaliGemmaBackbone(28, VISION, TEXT | {"vocabulary_size": 2048})
    return PaliGemmaCausalLM(backbone, preprocessor)


def printed(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_reads_pictures_and_what_is_known_of_them(paths):
    assert [path.name for path in paths] == ["cat.png", "dog.png"]
    folder = paths[0].parent
    assert demo.read_truth(folder) == {}
    scenes = {"cat.png": {"caption": "a cat"}, "dog.png": {"objects": []}}
    (folder / "scenes.json").write_text(json.dumps(scenes))
    assert demo.read_truth(folder) == {"cat.png": "a cat"}


def test_reads_pictures_as_cameras_name_them(tmp_path):
    names = ["IMG_1.JPG", "IMG_2.jpeg", "cat.webp"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in demo.read_pictures(tmp_path)] == names


@pytest.mark.parametrize(
    ("line", "match"),
    [('{"image": "a.png", "prefix": "ocr"}', "line 2"), ("a", "line 2")],
)
def test_a_line_that_is_no_example_ends_in_one_line(
    paths, tmp_path, capsys, line, match
):
    file = paths[0].parent / "prompts.jsonl"
    whole = '{"image": "cat.png", "prefix": "ocr", "suffix": "a\u2028b"}\n'
    file.write_text(whole + line)
    with pytest.raises(SystemExit):
        demo.main(["--pictures", str(file.parent)])
    assert match in capsys.readouterr().err
    file.write_text(whole + "\n")
    assert demo.read_examples(file)["responses"] == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("scenes.json", "[]", "scenes.json does not say what"),
        ("scenes.json", '{"cat.png": "caption"}', "scenes.json does not say"),
        ("scenes.json", '{"cat.png": {"caption": 1}}', "scenes.json does not"),
        (
            "prompts.jsonl",
            '{"image": ["cat.png", "dog.png"], "prefix": "a", "suffix": "b"}',
            "prompts.jsonl has a line of several",
        ),
        (
            "prompts.jsonl",
            '{"image": "none.png", "prefix": "a", "suffix": "b"}',
            "none.png",
        ),
        ("owl.png", "no picture", "owl.png"),
    ],
)
def test_a_folder_is_checked_before_a_model_is_loaded(
    paths, capsys, name, content, match
):
    folder = paths[0].parent
    (folder / name).write_text(content)
    with pytest.raises(SystemExit):
        demo.main(["--pictures", str(folder), "--preset", "/no/such/preset"])
    assert match in capsys.readouterr().err


def test_an_unknown_preset_ends_in_one_line(
    paths, tmp_path, monkeypatch, capsys
):
    """Shells do not expand `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset=/no/such/preset", "--output=~/output"]
    with pytest.raises(SystemExit):
        demo.main([f"--pictures=~/{paths[0].parent.name}", *arguments])
    assert "/no/such/preset" in capsys.readouterr().err
    assert (tmp_path / "output").is_dir()
    arguments[1] = f"--output={paths[0]}"
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert "File exists" in capsys.readouterr().err


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--pictures"):
        demo.read_pictures(tmp_path)


def test_all_batches_have_one_size_and_answers_keep_their_order(paths):
    model = Scripted()
    questions = [(paths[0], f"detect {i}") for i in range(11)]
    answers = demo.ask(model, questions, "Boxes")
    assert answers == [f"{BOX} {i}" for i in range(11)]
    assert model.sizes == [demo.BATCH_SIZE] * 2
    assert demo.ask(model, [], "Nothing") == []


def test_finds_all_and_counts_the_first_of_what_it_names(paths):
    cat, dog = demo.look(Scripted(), paths)
    assert cat.path == paths[0] and dog.caption == "a dog and an owl"
    assert [item.label for item in cat.objects] == ["cat", "owl"]
    assert dog.question == "answer en how many dog?" and dog.count == "2"


def test_a_caption_that_names_nothing_is_shown_alone(paths):
    model = Scripted()
    model.answer = lambda image, prompt: "cat cat"
    sights = demo.look(model, paths)
    assert sights == [Sight(path, "cat cat", [], "", "") for path in paths]


def test_draws_every_picture_and_a_sheet(paths, tmp_path):
    sights = demo.look(Scripted(), paths)
    written = demo.draw(sights, tmp_path / "new" / "output")
    assert [path.name for path in written] == [
        "cat.png_boxes.png",
        "dog.png_boxes.png",
        "contact_sheet.png",
    ]
    shapes = [read_image(path).shape for path in written]
    assert shapes[:2] == [(320, 480, 3), (490, 420, 3)]
    assert (
        shapes[2][0] > contact_sheet.CELL
        and shapes[2][1] > 2 * contact_sheet.CELL
    )
    assert np.ptp(read_image(written[0])) > 0


def test_pictures_of_one_name_are_drawn_apart(paths, tmp_path):
    """The folder's name is no markup, either."""
    shutil.copy(paths[0], paths[0].with_suffix(".JPG"))
    found = demo.read_pictures(paths[0].parent)
    output = tmp_path / "out[red][/blue]"
    console = Console(file=io.StringIO(), width=200)
    demo.show_sights(console, Scripted(), found, {}, output)
    assert len([*output.iterdir()]) == len(found) + 1 == 4
    assert console.file.getvalue().count(f"wrote {output}") == 4


def test_the_table_of_sights_marks_what_is_wrong():
    box = Object((0.1, 0.25, 0.5, 1.0), "cat")
    sights = [
        Sight(Path("a.png"), "a cat", [box], "answer en how many cat?", "3"),
        Sight(Path("b.png"), "a dog", [], "", ""),
        Sight(Path("c.png"), "a [red]fox[/]", [], "", ""),
    ]
    truth = {"a.png": "a cat", "b.png": "a pig"}
    text = printed(demo.sights_table(sights, truth))
    assert "✓ a cat" in text and "✗ a dog" in text and "not a pig" in text
    assert "cat: 10–50, 25–100" in text and "how many cat? 3" in text
    # An answer is shown literally, and never read as markup.
    assert "[red]fox[/]" in text


def test_other_prompts_are_answered_right_or_wrong():
    examples = demo.read_examples(demo.EXAMPLES / "pictures" / "prompts.jsonl")
    assert all(path.is_file() for path in examples["images"])
    answers = ["nonsense", *examples["responses"][1:]]
    text = printed(demo.prompts_table(examples, answers))
    assert "✗ nonsense" in text and "not une cloche" in text
    assert text.count("✓") == len(answers) - 1
    assert "caption de" in text and "eine Gitarre" in text


def test_says_how_many_captions_are_still_right(paths):
    console = Console(file=io.StringIO(), width=200)
    sights = [Sight(path, "a pig", [], "", "") for path in paths]
    truth = {"cat.png": "a cat and an owl"}
    demo.show_memory(console, Scripted(), sights, truth)
    assert "0 of 1 before, 1 of 1 after" in console.file.getvalue()


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_reads_the_examples_of_the_repository(name):
    examples = demo.read_examples(demo.EXAMPLES / "finetune" / name)
    assert 0 < len(examples["images"]) <= demo.BATCH_SIZE
    assert all(path.is_file() for path in examples["images"])
    after = examples["responses"]
    before = ["nonsense"] * len(after)
    text = printed(demo.finetune_table("Title", examples, before, after))
    assert "Title" in text and text.count("nonsense") == len(after)
    assert all(text.count(answer) >= 2 for answer in after)


def test_finetuning_trains_adapters_and_nothing_else(tiny, tmp_path):
    tiny.save_to_preset(tmp_path)
    model = type(tiny).from_preset(tmp_path)
    examples = demo.read_examples(demo.EXAMPLES / "finetune" / "train.jsonl")
    losses = demo.finetune(model, examples, epochs=3)
    assert len(losses) == 3 and losses[-1] < losses[0]
    names = {v.path.rsplit("/", 1)[1] for v in model.trainable_variables}
    assert names == {"adapter_a", "adapter_b"}
    table = model.backbone.token_embedding.table
    np.testing.assert_array_equal(
        table.numpy(), tiny.backbone.token_embedding.table.numpy()
    )


def test_the_whole_demo_runs_with_any_preset(
    tiny, tmp_path, monkeypatch, capsys
):
    tiny.save_to_preset(tmp_path / "tiny")
    monkeypatch.setattr(demo, "EPOCHS", 2)
    output = tmp_path / "output"
    demo.main(["--preset", str(tmp_path / "tiny"), "--output", str(output)])
    text = capsys.readouterr().out
    pictures = demo.read_pictures(demo.EXAMPLES / "pictures")
    assert len(list(output.iterdir())) == len(pictures) + 1
    assert all(path.name in text for path in pictures)
    assert "2 steps" in text and "Done in" in text
    assert "Other prompts" in text and "caption ja" in text
    # The note about the nano preset is not shown for other models.
    assert "emoji" not in text


def test_a_wrong_folder_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--pictures", str(tmp_path)])
    assert "nothing to look at" in capsys.readouterr().err


def flat(text):
    return " ".join(text.split())


@pytest.mark.slow
def test_the_nano_preset_sees_and_learns(tmp_path, capsys):
    demo.main(["--output", str(tmp_path)])
    text = capsys.readouterr().out
    assert "a photograph is a guess" in text
    assert re.search(r"right: [34] of 4 before, \d of 4 after", flat(text))
    first, last = re.search(r"loss (\S+) → (\S+);", flat(text)).groups()
    assert float(last) < 0.2 * float(first)
