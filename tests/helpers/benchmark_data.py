"""Data folders in the layouts of benchmarks."""

import json
import pickle

import numpy as np
from PIL import Image


def make_data(folder, rows=12):
    """Write rows with a picture each, in our own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            pixels = np.full((8, 8, 3), (*divmod(number, 20), 9), "uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
            line = {
                **{"id": f"q{number}", "images": f"{number}.png"},
                **{"question": "what?", "answers": [f"a {number}\n🐈"] * 10},
            }
            file.write(json.dumps(line) + "\n")
    return folder


def change_sample(data, row, **fields):
    """Change a sample's line; the value `None` removes a field."""
    lines = (data / "samples.jsonl").read_text("utf-8").splitlines()
    one = json.loads(lines[row]) | fields
    lines[row] = json.dumps({k: v for k, v in one.items() if v is not None})
    (data / "samples.jsonl").write_text("\n".join(lines) + "\n")


def put(folder, name, data):
    """Write a JSON file, a JSON Lines file or a picture."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, tuple):
        Image.new("RGB", data, "green").save(path)
    elif name.endswith((".jsonl", "test1.json")):
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    else:
        path.write_text(json.dumps(data))


def chartqa_human(folder):
    for kind in ("human", "augmented"):
        data = [
            {"imgname": f"{n}.png", "query": f"{kind} {n}?", "label": f"{n}%"}
            for n in range(3)
        ]
        put(folder, f"test/test_{kind}.json", data)
    for n in range(3):
        put(folder, f"test/png/{n}.png", (8, 6))
    return [(f"human-{n}", f"human {n}?", f"{n}%") for n in range(3)]


def refcoco_testa(folder):
    image = {"id": 5, "file_name": "five.jpg", "height": 20, "width": 40}
    square = [[10, 5, 20, 5, 20, 15, 10, 15]]
    found = {"id": 9, "image_id": 5, "bbox": [10, 5, 10, 10]}
    found["segmentation"] = square
    instances = {"images": [image], "annotations": [found]}
    put(folder, "refcoco/instances.json", instances)
    sentences = [
        {"sent_id": n, "sent": text, "raw": text.upper(), "tokens": [text]}
        for n, text in enumerate(("left cup", "cup", "the red one"))
    ]
    ref = {"ref_id": 2, "image_id": 5, "ann_id": 9, "split": "testA"}
    refs = [ref | {"sentences": sentences}]
    refs.append(ref | {"split": "val", "sentences": sentences})
    with open(folder / "refcoco" / "refs(unc).p", "wb") as file:
        pickle.dump(refs, file, protocol=0)
    put(folder, "train2014/five.jpg", (40, 20))
    box = (5 / 20, 10 / 40, 15 / 20, 20 / 40)
    return [
        (f"2-{n}", sentence["sent"], box)
        for n, sentence in enumerate(sentences)
    ]
