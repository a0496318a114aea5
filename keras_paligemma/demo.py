"""The package in a minute: `python -m keras_paligemma.demo`.

The embedded nano preset captions a few small pictures in several languages,
detects objects and counts them. Then it is fine-tuned on a handful of examples
that it gets wrong. Drawings are written to a folder, answers to the terminal.
"""

import argparse
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import track
from rich.table import Table
from rich.text import Text

from keras_paligemma import atomic
from keras_paligemma import shipped
from keras_paligemma.config import read_json
from keras_paligemma.data.jsonl import JSONLSource
from keras_paligemma.data.object_set import SUFFIXES
from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.contact_sheet import contact_sheet
from keras_paligemma.tasks.drawing import draw_objects
from keras_paligemma.tasks.objects import Object

NANO = "pali_gemma2_nano_112"
EXAMPLES = shipped.folder("examples")

# The same for all batches: another size needs another compilation.
BATCH_SIZE = 8

# Enough for the examples to be learnt; `examples/finetune/README.md` has more.
LORA_RANK, LORA_ALPHA = 8, 16
LEARNING_RATE = 3e-3
EPOCHS = 60


class Sight(NamedTuple):
    """A model's answers about one picture.

    Args:
        path: path of the picture.
        caption: str.
        objects: list of `Object`, for every noun of the caption.
        question: str, a prompt that asks for a count; "" if the caption has
            no noun.
        count: str, the answer.
    """

    path: Path
    caption: str
    objects: list[Object]
    question: str
    count: str


def read_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder, sorted by name."""
    paths = [p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"There is nothing to look at. Expected: {', '.join(SUFFIXES)} in "
            f"{folder}. Received: none. Pass another folder as --pictures."
        )
    return sorted(paths)


def read_truth(folder: Path) -> dict[str, str]:
    """Return file names with their true captions, from `scenes.json` if any."""
    path = folder / "scenes.json"
    scenes = read_json(path) if path.is_file() else {}
    if not isinstance(scenes, dict) or not all(
        isinstance(scene, dict) and isinstance(scene.get("caption", ""), str)
        for scene in scenes.values()
    ):
        raise ValueError(
            f"{path} does not say what is in the pictures. Expected: "
            '{"cat.png": {"caption": "a cat"}}, or no such file. Received: '
            f"{scenes!r:.80}."
        )
    return {
        name: scene["caption"]
        for name, scene in scenes.items()
        if "caption" in scene
    }


def read_examples(path: Path) -> dict[str, list]:
    """Read JSON lines that have an image, a prefix and a suffix.

    Args:
        path: path; image paths are relative to its folder.

    Returns:
        dict of lists `images` (paths), `prompts`, `responses`, for `fit`.
    """
    rows = [*JSONLSource(path, allow_empty=True)]
    if not all(isinstance(text, str) for row in rows for text in row.values()):
        raise ValueError(
            f"{path} has a line of several pictures or answers. Expected: one "
            "of each. Received: lists."
        )
    return {
        "images": [Path(row["images"]) for row in rows],
        "prompts": [row["prompts"] for row in rows],
        "responses": [row["responses"] for row in rows],
    }


def nouns(caption: str) -> list[str]:
    """Return the words after indefinite articles, each once.

    >>> nouns("a cat, an owl and a cat")
    ['cat', 'owl']
    """
    return list(dict.fromkeys(re.findall(r"\ban? (\w+)", caption)))


def ask(model, questions: list[tuple], title: str) -> list[str]:
    """Generate answers, with a progress bar.

    Args:
        model: `PaliGemmaCausalLM`.
        questions: list of (picture, prompt).
        title: str, title of the progress bar.

    Returns:
        list of answers, one per question.
    """
    answers = []
    for start in track(range(0, len(questions), BATCH_SIZE), title):
        batch = questions[start : start + BATCH_SIZE]
        filled = batch + batch[-1:] * (BATCH_SIZE - len(batch))
        pictures, prompts = map(list, zip(*filled, strict=True))
        inputs = {"images": pictures, "prompts": prompts}
        answers += model.generate(inputs)[: len(batch)]
    return answers


def look(model, paths: list[Path]) -> list[Sight]:
    """Caption pictures, detect each noun named, and count the first one.

    Args:
        model: `PaliGemmaCausalLM`.
        paths: list of paths of pictures.

    Returns:
        list of `Sight`, one per picture.
    """
    captions = ask(model, [(p, "caption en") for p in paths], "Captions")
    named = [
        (path, noun)
        for path, caption in zip(paths, captions, strict=True)
        for noun in nouns(caption)
    ]
    found = {path: [] for path in paths}
    answers = ask(model, [(p, f"detect {noun}") for p, noun in named], "Boxes")
    for (path, _), answer in zip(named, answers, strict=True):
        found[path] += read_objects(answer)
    first = {path: noun for path, noun in reversed(named)}
    questions = {p: f"answer en how many {n}?" for p, n in first.items()}
    counts = ask(model, list(questions.items()), "Counts")
    counts = dict(zip(questions, counts, strict=True))
    return [
        Sight(p, c, found[p], questions.get(p, ""), counts.get(p, ""))
        for p, c in zip(paths, captions, strict=True)
    ]


def draw(sights: list[Sight], folder: Path) -> list[Path]:
    """Write each picture with its boxes, and a contact sheet of all.

    Args:
        sights: list of `Sight`, the result of `look`.
        folder: path, created if missing.

    Returns:
        list of the paths of the files, the sheet last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_objects(sight.path, sight.objects) for sight in sights]
    # Whole names: a folder may have a `cat.png` and a `cat.jpg`.
    paths = [folder / f"{sight.path.name}_boxes.png" for sight in sights]
    for picture, path in zip(drawn, paths, strict=True):
        picture.save(path)
    sheet = contact_sheet(drawn, [sight.caption for sight in sights])
    sheet.save(folder / "contact_sheet.png")
    return [*paths, folder / "contact_sheet.png"]


def finetune(model, examples: dict[str, list], epochs: int) -> list[float]:
    """Train low-rank adapters on a few examples, one batch per epoch.

    Args:
        model: `PaliGemmaCausalLM` without adapters.
        examples: dict, the result of `read_examples`.
        epochs: int.

    Returns:
        list of the losses of all epochs.
    """
    import keras

    # A fixed seed, since some random adapters learn badly.
    keras.utils.set_random_seed(0)
    model.enable_lora(LORA_RANK, alpha=LORA_ALPHA)
    model.compile(keras.optimizers.Adam(LEARNING_RATE))
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("Fine-tuning", total=epochs)
        advance = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress.advance(task)
        )
        history = model.fit(
            examples,
            batch_size=len(examples["prompts"]),
            epochs=epochs,
            verbose=0,
            callbacks=[advance],
        )
    return history.history["loss"]


def judged(answer: str, wanted: str | None) -> Text:
    """Return an answer coloured by correctness, with the right one if wrong."""
    if wanted is None:
        return Text(answer)
    if answer == wanted:
        return Text(f"✓ {answer}", "green")
    return Text(f"✗ {answer}", "red").append(f"\n  not {wanted}", "default")


def sights_table(sights: list[Sight], truth: dict[str, str]) -> Table:
    """Return a table of the answers, compared with the truth where known."""
    table = Table("picture", "caption en", "boxes in %: y, x", "count")
    for path, caption, objects, question, count in sights:
        places = [
            "{}: {:.0f}–{:.0f}, {:.0f}–{:.0f}".format(
                item.label, *(100 * item.box[edge] for edge in (0, 2, 1, 3))
            )
            for item in objects
        ]
        table.add_row(
            Text(path.name),
            judged(caption, truth.get(path.name)),
            Text("\n".join(places)),
            Text(f"{question.removeprefix('answer en ')} {count}"),
        )
    return table


def prompts_table(examples: dict[str, list], answers: list[str]) -> Table:
    """Return a table of answers to further prompts, right or wrong."""
    table = Table("picture", "prompt", "answer", title="Other prompts")
    rows = zip(*examples.values(), answers, strict=True)
    for image, prompt, wanted, answer in rows:
        table.add_row(Text(image.name), Text(prompt), judged(answer, wanted))
    return table


def ask_all(model, examples: dict[str, list], title: str) -> list[str]:
    """Generate the answers to the prompts of examples."""
    questions = zip(examples["images"], examples["prompts"], strict=True)
    return ask(model, list(questions), title)


def finetune_table(
    title: str, examples: dict[str, list], before: list[str], after: list[str]
) -> Table:
    """Return a table of answers before and after the fine-tuning."""
    columns = ("picture", "prompt", "wanted", "before", "after")
    table = Table(*columns, title=title)
    for image, prompt, wanted, *answers in zip(
        *examples.values(), before, after, strict=True
    ):
        styles = ["green" if a == wanted else "red" for a in answers]
        table.add_row(
            Text(image.name),
            Text(prompt),
            Text(wanted),
            *map(Text, answers, styles),
        )
    return table


def show_sights(console, model, paths, truth, output) -> list[Sight]:
    """Print and draw a model's answers about pictures."""
    console.rule("1. Look at pictures")
    sights = look(model, paths)
    console.print(sights_table(sights, truth))
    for path in draw(sights, output):
        console.print(f"wrote {path}", highlight=False, markup=False)
    return sights


def show_prompts(console, model, examples) -> None:
    """Print a model's answers to further prompts."""
    answers = ask_all(model, examples, "Other prompts")
    console.print(prompts_table(examples, answers))


def show_learning(console, model, seen, unseen) -> None:
    """Fine-tune a model on the examples in `seen`; print the results."""
    console.rule("2. Learn from a handful of examples")
    parts = {
        "What it was trained on": seen,
        "What it was not trained on": unseen,
    }
    before = [ask_all(model, part, "Before") for part in parts.values()]
    losses = finetune(model, seen, EPOCHS)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    console.print(
        f"{len(seen['prompts'])} examples, {len(losses)} steps, loss "
        f"{losses[0]:.2f} → {losses[-1]:.2f}; LoRA of rank {LORA_RANK} "
        f"trained {trained / model.count_params():.1%} of the parameters."
    )
    for (title, part), old in zip(parts.items(), before, strict=True):
        new = ask_all(model, part, "After")
        console.print(finetune_table(title, part, old, new))


def show_memory(console, model, sights, truth) -> None:
    """Print how many captions were right before and after fine-tuning."""
    known = [sight for sight in sights if sight.path.name in truth]
    questions = [(sight.path, "caption en") for sight in known]
    wanted = [truth[sight.path.name] for sight in known]
    now = ask(model, questions, "Old scenes")
    before, after = (
        sum(map(str.__eq__, answers, wanted))
        for answers in ([sight.caption for sight in known], now)
    )
    console.print(
        "The old scenes, captions word for word right: "
        f"{before} of {len(known)} before, {after} of {len(known)} after."
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the demo; `arguments` are those of the command line."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m keras_paligemma.demo", description=__doc__
    )
    parser.add_argument("--output", type=Path, default="demo_output")
    parser.add_argument("--preset", default=NANO)
    parser.add_argument("--pictures", type=Path, default=EXAMPLES / "pictures")
    options = parser.parse_args(arguments)
    try:
        pictures = Path(os.path.expanduser(options.pictures))
        paths = read_pictures(pictures)
        truth = read_truth(pictures)
        seen = read_examples(EXAMPLES / "finetune" / "train.jsonl")
        unseen = read_examples(EXAMPLES / "finetune" / "test.jsonl")
        file = pictures / "prompts.jsonl"
        others = read_examples(file) if file.is_file() else None
        for path in [*paths, *(others["images"] if others else [])]:
            read_image(path)
        output = atomic.local(options.output)
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    # Before Keras is imported, since it then reads its backend. TensorFlow's
    # start-up messages do not concern this package.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    console = Console()
    with console.status("Importing Keras and loading the preset"):
        import keras

        from keras_paligemma import PaliGemmaCausalLM

        try:
            model = PaliGemmaCausalLM.from_preset(options.preset)
        except (ImportError, OSError, ValueError) as error:
            parser.error(str(error))
    console.print(
        f"[bold]{escape(options.preset)}[/] on {keras.backend.backend()}: "
        f"{model.count_params() / 1e6:.1f} million parameters"
    )
    if options.preset == NANO:
        console.print(
            "It knows 50 classes of emoji on small composed scenes, and "
            "nothing else: what it says of a photograph is a guess."
        )
    sights = show_sights(console, model, paths, truth, output)
    if others:
        show_prompts(console, model, others)
    show_learning(console, model, seen, unseen)
    if truth:
        show_memory(console, model, sights, truth)
    console.print(f"Done in {time.monotonic() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
