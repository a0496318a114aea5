"""One small data set for each kind of task, from its files to the metric.

The data sets are made with packages from registries: scenes of sprites,
easy-vqa, rendered text, RDKit's drawings, scores by verovio, charts by
matplotlib, tables, pairs and clips. A perfect oracle gets the metric's best
value. A shuffled oracle gets the metric's value of the shuffled answers.
"""

import functools
import json

import numpy as np
import pytest
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from keras_paligemma import metrics
from keras_paligemma.evaluation import benchmarks
from keras_paligemma.evaluation import evaluate
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from keras_paligemma.tasks.answers import write_object
from keras_paligemma.tasks.objects import Object
from recipes.nano import scenes
from tests.helpers.oracle import Oracle
from tests.recipes_nano.test_scenes import CLASSES
from tests.recipes_nano.test_scenes import STYLES
from tests.recipes_nano.test_scenes import make_sprites

ROWS = 6


@functools.cache
def scene(number):
    """Return a picture, and (name, box) of its objects from left to right."""
    random = np.random.default_rng([21, number])
    count = 1 + number % 3
    names = scenes.draw(random, CLASSES, 1) * count
    image, objects, _ = scenes.compose(
        random, make_sprites(), STYLES, names, size=84
    )
    return image, objects


def text_picture(lines, size=(160, 64)):
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((6, 6), "\n".join(lines), "black", ImageFont.load_default(16))
    return picture


def picture_of(array):
    return Image.fromarray(np.asarray(array, "uint8"))


def caption():
    """Make a caption of the sprites in a scene."""
    for number in range(ROWS):
        image, objects = scene(number)
        words = " and ".join(f"a small {name}" for name, *_ in objects)
        text = f"here is {words}"
        yield picture_of(image), {"references": [text]}, text


def count():
    """Make a counting question about sprites."""
    for number in range(ROWS):
        image, objects = scene(number)
        fields = {"question": f"how many {objects[0][0]} ?"}
        right = str(len(objects))
        simple = len(objects) < 3
        yield (
            picture_of(image),
            fields | {"answers": right, "simple": int(simple)},
            right,
        )


def choice():
    """Make a multiple-choice question with four names."""
    for number in range(ROWS):
        image, objects = scene(number)
        name = objects[0][0]
        wrong = [other for other in CLASSES if other != name][:3]
        fields = {"question": "what is it?", "choices": [name, *wrong]}
        yield picture_of(image), fields | {"answers": name}, name


def object_():
    """Make boxes whose edges are thirds, so that pixels match exactly."""
    for number in range(ROWS):
        y, x = divmod(number, 3)
        box = (y / 3, x / 3, (y + 1) / 3, (x + 1) / 3)
        pixels = np.full((96, 96, 3), 90 + number, "uint8")
        mask = np.zeros((96, 96), "uint8")
        rows = slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32)
        pixels[rows], mask[rows] = (250, 40, 40), 1
        from pycocotools import mask as codec

        runs = codec.encode(np.asfortranarray(mask))
        runs = {"size": runs["size"], "counts": runs["counts"].decode()}
        fields = {"sentence": f"part {number}", "boxes": box, "masks": runs}
        yield picture_of(pixels), fields, write_object(Object(box), [0] * 16)


def question():
    """Make a question of easy-vqa: shapes and colours, thirteen answers."""
    import easy_vqa

    paths = easy_vqa.get_test_image_paths()
    texts, answers, pictures = easy_vqa.get_test_questions()
    used = set()
    for text, answer, number in zip(texts, answers, pictures, strict=True):
        if number in used:
            continue
        used.add(number)
        with Image.open(paths[number]) as opened:
            image = opened.convert("RGB")
        fields = {"question": text, "answers": [answer] * 10}
        yield image, fields | {"answer_types": "other"}, answer
        if len(used) == ROWS:
            return


def reading():
    """Make a picture of rendered text."""
    for number in range(ROWS):
        word = f"Shop {number * 37 + 11}"
        fields = {"question": "what is written?", "answers": [word] * 10}
        yield text_picture([word]), fields, word


def words():
    """Make a picture of rendered words at known places."""
    for number in range(ROWS):
        picture = Image.new("RGB", (160, 64), "white")
        pen = ImageDraw.Draw(picture)
        font = ImageFont.load_default(16)
        polygons, texts, answers = [], [], []
        for at, word in ((6, f"Exit{number}"), (90, "Open")):
            pen.text((at, 8), word, "black", font)
            left, top, right, low = pen.textbbox((at, 8), word, font)
            polygons.append(
                [[left, top], [right, top], [right, low], [left, low]]
            )
            texts.append(word)
            edges = (left, top, right, low)
            box = Object.from_xyxy(edges, (64, 160), label=word)
            answers.append(write_object(box))
        fields = {"polygons": polygons, "texts": texts, "sizes": [64, 160]}
        yield picture, fields, " ; ".join(answers)


def chart():
    """Make a bar chart by matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for number in range(ROWS):
        heights = [5 + 6 * number, 10, 40]
        figure, axes = pyplot.subplots(figsize=(1.6, 1.2), dpi=60)
        axes.bar(["a", "b", "c"], heights)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        pyplot.close(figure)
        fields = {"question": "What is the value of a?"}
        yield (
            picture_of(pixels),
            fields | {"answers": str(heights[0])},
            (
                # Within 5 %.
                str(heights[0] * 1.04)
            ),
        )


def table():
    """Make a table: its cells in reading order, and a drawing."""
    for number in range(ROWS):
        cells = [["Name", "Score"], [f"no {number}", str(90 - number)]]
        rows = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
            for row in cells
        )
        html = f"<table>{rows}</table>"
        lines = ["  |  ".join(row) for row in cells]
        yield text_picture(lines), {"html": html}, html


def music():
    """Make bars of piano music, engraved by verovio."""
    import io

    import resvg_py
    import verovio

    toolkit = verovio.toolkit()
    toolkit.setOptions(
        {"adjustPageHeight": True, "pageWidth": 900, "scale": 30}
    )
    for number in range(ROWS):
        high = "efgab"[number % 5]
        kern = "\n".join(
            [
                *("**kern\t**kern", "*clefF4\t*clefG2", "*M2/4\t*M2/4"),
                *("=1\t=1", f"4C\t4{high}", f"4D\t8c{'#' * (number % 2)}"),
                *(".\t8d", "==\t==", "*-\t*-"),
            ]
        )
        toolkit.loadData(kern)
        svg = toolkit.renderToSVG(1)
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, background="white"))
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        yield picture, {"scores": kern}, kern


def molecule():
    """Make a drawing by RDKit; the oracle uses a spelling of its own."""
    from rdkit import Chem
    from rdkit.Chem import Draw

    texts = ["CCO", "c1ccccc1O", "CC(=O)O", "C1CCCCC1", "CN", "C#N"]
    for text in texts[:ROWS]:
        molecule = Chem.MolFromSmiles(text)
        other = Chem.MolToSmiles(molecule, canonical=False, kekuleSmiles=False)
        picture = Draw.MolToImage(molecule, (120, 90)).convert("RGB")
        yield picture, {"molecules": text}, other


def pair():
    """Make two scenes, and ask whether they have equally many objects."""
    for number in range(ROWS):
        left, right = scene(number), scene(number + 1 + number % 2 * 2)
        same = str(len(left[1]) == len(right[1]))
        fields = {"sentence": "Both have as many.", "answers": same}
        yield [picture_of(side[0]) for side in (left, right)], fields, same


def video():
    """Make a clip of a moving square."""
    for number in range(ROWS):
        frames = []
        ends = number % 2
        for at in range(9):
            frame = np.full((42, 42, 3), 200 - number, "uint8")
            x = 4 * at if ends else 32 - 4 * at
            frame[16:24, x : x + 8] = (20, 20, 220)
            frames.append(picture_of(frame))
        answer = ("left", "right")[ends]
        yield (
            frames,
            {"question": "where does it go?", "answers": answer},
            answer,
        )


# A kind of task, its maker, a benchmark of that kind, and the best value.
KINDS = {
    "caption": (caption, "screen2words", 1000),
    "chart": (chart, "chartqa_human", 100),
    "choice": (choice, "ai2d", 100),
    "count": (count, "tallyqa_simple", 100),
    "molecule": (molecule, "pubchem", 100),
    "music": (music, "grandstaff", 0),
    "object": (object_, "refcoco_val", 100),
    "pair": (pair, "nlvr2", 100),
    "question": (question, "vqav2", 100),
    "reading": (reading, "textvqa", 100),
    "table": (table, "pubtabnet", 100),
    "video": (video, "msvd_qa", 100),
    "words": (words, "icdar2015", 100),
}


def test_each_kind_is_tested():
    assert {benchmark.kind for benchmark in benchmarks().values()} == set(KINDS)
    for kind, (_, name, _) in KINDS.items():
        assert find_benchmark(name).kind == kind


def write(folder, made):
    """Write a data set in our own layout, and return the oracle's answers."""
    answers = []
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for number, (image, fields, answer) in enumerate(made):
            names = []
            if isinstance(image, list) and len(image) > 2:
                names = f"{number}.gif"
                image[0].save(
                    folder / names, save_all=True, append_images=image[1:]
                )
            else:
                for place, row in enumerate(
                    image if isinstance(image, list) else [image]
                ):
                    names.append(f"{number}-{place}.png")
                    row.save(folder / names[-1])
                names = names if isinstance(image, list) else names[0]
            record = {"id": f"s{number}", "images": names} | fields
            file.write(json.dumps(record) + "\n")
            answers.append(answer)
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_kind_end_to_end(kind, tmp_path):
    make, name, best = KINDS[kind]
    benchmark = find_benchmark(name)
    data = tmp_path / "data"
    data.mkdir()
    answers = write(data, make())
    samples = open_samples(benchmark, data)
    assert len(samples) == ROWS

    def decode(codes):
        return np.ones((len(codes), 64, 64), "float32")

    options = {"batch_size": 4, "progress": False}
    if kind == "object":
        options["decode"] = decode
    perfect = evaluate(
        Oracle(samples, answers), name, data, tmp_path / "perfect", **options
    )
    assert perfect.values[benchmark.value] == pytest.approx(best, abs=1e-9)
    assert perfect.card == benchmark.card_numbers("224-3B")
    assert perfect.samples == ROWS and not perfect.limited

    shuffled = answers[1:] + answers[:1]
    other = evaluate(
        Oracle(samples, shuffled), name, data, tmp_path / "other", **options
    )
    columns = {}
    with open(data / "samples.jsonl", encoding="utf-8") as file:
        for line in file:
            for field, value in json.loads(line).items():
                columns.setdefault(field, []).append(value)
    wanted = score_of(benchmark, shuffled, columns, decode)
    value = other.values[benchmark.value]
    assert value == pytest.approx(wanted * 100, abs=1e-9)
    assert (value > best) if kind == "music" else (value < best)
    page = (tmp_path / "other" / "report.html").read_text("utf-8")
    assert page.count("<figure>") == ROWS and "data:image/jpeg" in page


def score_of(benchmark, texts, columns, decode):
    """Compute the metric of the shuffled answers without the run's code."""
    pairs = list(zip(texts, columns.get("answers", texts), strict=True))
    simple = columns.get("simple")
    by_hand = {
        "vqa": lambda: [text == right for text, right in pairs],
        "vqav2": lambda: [text == right[0] for text, right in pairs],
        "tallyqa": lambda: [
            text == right
            for (text, right), is_simple in zip(
                pairs, simple or (), strict=True
            )
            if is_simple
        ],
        "relaxed_accuracy": lambda: [
            abs(float(text) / float(right) - 1) <= 0.05 for text, right in pairs
        ],
        "smiles": lambda: [False] * ROWS,
        "refcoco": lambda: [0.0] * ROWS,
    }
    if benchmark.metric in by_hand:
        return float(np.mean(by_hand[benchmark.metric]()))
    names = {"cider": ["references"], "music": ["scores"], "tables": ["html"]}
    names["text_detection"] = ["polygons", "texts", "sizes"]
    function = getattr(metrics, benchmark.metric)
    right = {name: columns[name] for name in names[benchmark.metric]}
    return function(texts, **right).values()[benchmark.value]
