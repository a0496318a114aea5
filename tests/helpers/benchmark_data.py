"""Folders of data as benchmarks have it."""

import json

import numpy as np
from PIL import Image


def make_data(folder, rows=12):
    """Rows of pictures of their own, in our own layout."""
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
    """Change a sample's line; `None` takes a field away."""
    lines = (data / "samples.jsonl").read_text("utf-8").splitlines()
    one = json.loads(lines[row]) | fields
    lines[row] = json.dumps({k: v for k, v in one.items() if v is not None})
    (data / "samples.jsonl").write_text("\n".join(lines) + "\n")


def put(folder, name, data):
    """Write a file of JSON, or of JSON lines, or a picture."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, tuple):
        Image.new("RGB", data, "green").save(path)
    elif name.endswith((".jsonl", "test1.json")):
        path.write_text("".join(json.dumps(one) + "\n" for one in data))
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
