"""Readers of unpacked official archives.

A reader takes folder, split and subset, and returns a list of records with
the benchmark's field names.
"""

import csv
import hashlib
import pickle
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keras_paligemma.config import parse_json
from keras_paligemma.metrics.needs import needed
from keras_paligemma.tasks.prompts import lettered

# Size of the original's "minival", a part of VQAv2's validation split.
_MINIVAL = 10_240


def in_archive(folder: Path, *names: str) -> Path:
    """Return the path of the first of the files that exists.

    Raises:
        ValueError: none exists.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} lacks a file of the official archive. Expected: "
        f"{' or '.join(names)}."
    )


def read_json(folder: Path, *names: str):
    """Read the first of the files that exists.

    Raises:
        ValueError: none exists, or the file is not JSON.
    """
    path = in_archive(folder, *names)
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the JSON of each line that is not blank.

    Raises:
        ValueError: a line is not JSON.
    """
    # Bytes, as text may have other ends of lines within a string.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}, is not JSON: {error}.") from error
            yield place, record


def vqav2(folder, split, subset=None):
    """VQAv2: `v2_OpenEnded_mscoco_val2014_questions.json` and so on.

    The original's minival is the last 10,240 questions of TensorFlow Datasets,
    which orders them by a hash. The same order is computed here.
    """
    part = {"minival": "val", "validation": "val"}.get(split, split)
    prefix = "v2_OpenEnded_mscoco_"
    asked = read_json(folder, f"{prefix}{part}2014_questions.json")["questions"]
    right = read_json(folder, f"v2_mscoco_{part}2014_annotations.json")
    right = {entry["question_id"]: entry for entry in right["annotations"]}
    if split == "minival":
        order = sorted(
            asked, key=lambda entry: _tfds_order(entry["question_id"])
        )
        asked = order[-_MINIVAL:]
    pictures = folder / f"{part}2014"
    records = []
    for entry in asked:
        answer = right.get(entry["question_id"], {})
        name = f"COCO_{part}2014_{entry['image_id']:012d}.jpg"
        records.append(
            {
                "id": entry["question_id"],
                "images": str(pictures / name),
                "question": entry["question"],
                "answers": [a["answer"] for a in answer.get("answers", ())]
                or None,
                "answer_types": answer.get("answer_type"),
            }
        )
    return records


def _tfds_order(key, salt="validation"):
    return hashlib.md5(f"{salt}{key}".encode()).digest()


def textvqa(folder, split, subset=None):
    """TextVQA: `TextVQA_0.5.1_val.json` and `train_images/`.

    Some pictures lie on their side. As in the original, they are turned as
    OpenImages lists them, if its list is `train_images/rotation.csv`.
    """
    data = read_json(folder, f"TextVQA_0.5.1_{split}.json")["data"]
    pictures = folder / ("test_images" if split == "test" else "train_images")
    turns = _turns(pictures / "rotation.csv")
    return [
        {
            "id": entry["question_id"],
            "images": str(pictures / f"{entry['image_id']}.jpg"),
            "question": entry["question"],
            "answers": entry.get("answers"),
            "turns": turns.get(entry["image_id"]),
        }
        for entry in data
    ]


def _turns(path):
    """Return the quarter turns to the left of OpenImages' rotated pictures."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        degrees = {
            row["ImageID"]: float(row["Rotation"] or 0)
            for row in csv.DictReader(file)
        }
    return {name: int(turn) // 90 for name, turn in degrees.items() if turn}


def docvqa(folder, split, subset=None):
    """DocVQA: `val_v1.0_withQT.json` and `documents/`."""
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    return [
        {
            "id": entry["questionId"],
            "images": str(folder / entry["image"]),
            "question": entry["question"],
            "answers": entry.get("answers"),
        }
        for entry in read_json(folder, *names)["data"]
    ]


def chartqa(folder, split, subset=None):
    """ChartQA: `test/test_human.json` and `test/png/`."""
    records = []
    for kind in (subset,) if subset else ("human", "augmented"):
        data = read_json(folder, f"{split}/{split}_{kind}.json")
        records += [
            {
                "id": f"{kind}-{number}",
                "images": str(folder / split / "png" / entry["imgname"]),
                "question": entry["query"],
                "answers": entry["label"],
                "kinds": kind,
            }
            for number, entry in enumerate(data)
        ]
    return records


def science_qa(folder, split, subset=None):
    """ScienceQA: `problems.json`, `pid_splits.json`, `test/ID/image.png`.

    As in the original, questions without a picture are skipped, and a missing
    hint is "N/A".
    """
    problems = read_json(folder, "problems.json")
    splits = read_json(folder, "pid_splits.json")
    if split not in splits:
        raise ValueError(
            f"{folder / 'pid_splits.json'} has no such split. Expected: one "
            f"of {list(splits)}. Received: {split!r}."
        )
    records = []
    for id in splits[split]:
        entry = problems[id]
        if not entry["image"]:
            continue
        letters = string.ascii_uppercase[: len(entry["choices"])]
        records.append(
            {
                "id": id,
                "images": str(folder / split / id / entry["image"]),
                "question": entry["question"],
                "hint": entry["hint"] or "N/A",
                "choices": lettered(entry["choices"]),
                "answers": letters[entry["answer"]],
            }
        )
    return records


def nlvr2(folder, split, subset=None):
    """NLVR2: `data/test1.json`, one sample per line, and `test1/`."""
    part = {"test": "test1"}.get(split, split)
    records = []
    for _, entry in read_json_lines(in_archive(folder, f"data/{part}.json")):
        # Sentences about the same pair differ in the last number.
        pair = entry["identifier"].rpartition("-")[0]
        places = [folder / part, folder / "images" / part]
        place = next((some for some in places if some.is_dir()), places[0])
        if "directory" in entry:
            place = folder / "images" / part / str(entry["directory"])
        records.append(
            {
                "id": entry["identifier"],
                "images": [str(place / f"{pair}-img{n}.png") for n in (0, 1)],
                "sentence": entry["sentence"],
                "answers": entry["label"],
            }
        )
    return records


def tallyqa(folder, split, subset=None):
    """TallyQA: `test.json`, and the pictures of Visual Genome and COCO."""
    return [
        {
            "id": entry["question_id"],
            "images": str(folder / entry["image"]),
            "question": entry["question"],
            "answers": str(entry["answer"]),
            # Missing for Visual Genome's part of the training split.
            "simple": int(entry.get("issimple", -1)),
        }
        for entry in read_json(folder, f"{split}.json")
    ]


def coco_captions(folder, split, subset=None):
    """COCO's captions: Karpathy's `dataset_coco.json`, `val2014/`.

    Without that file, COCO's own split is read from
    `annotations/captions_val2014.json`; its values are not comparable with the
    card's.
    """
    if not (folder / "dataset_coco.json").is_file():
        name = f"captions_{split}2014.json"
        data = read_json(folder, "dataset_coco.json", f"annotations/{name}")
        texts = {}
        for entry in data["annotations"]:
            texts.setdefault(entry["image_id"], []).append(entry["caption"])
        return [
            {
                "id": entry["id"],
                "images": str(folder / f"{split}2014" / entry["file_name"]),
                "references": texts.get(entry["id"]),
            }
            for entry in data["images"]
        ]
    parts = {"train": ("train", "restval")}.get(split, (split,))
    return [
        {
            "id": entry["cocoid"],
            "images": str(folder / entry["filepath"] / entry["filename"]),
            "references": [some["raw"] for some in entry["sentences"]],
        }
        for entry in read_json(folder, "dataset_coco.json")["images"]
        if entry["split"] in parts
    ]


def xm3600(folder, split, subset=None):
    """XM3600: `captions.jsonl`, one picture per line, and `images/`.

    The file has all languages, of which the benchmark names those it scores,
    and no splits.
    """
    path = in_archive(folder, "captions.jsonl")
    if split != "{language}":
        raise ValueError(
            f"{path} holds all languages, and no splits. Expected: `split` "
            f"None. Received: {split!r}."
        )
    records = []
    for _, entry in read_json_lines(path):
        key = entry["image/key"]
        records += [
            {
                "id": f"{key}_{language}",
                "images": str(folder / "images" / f"{key}.jpg"),
                "language": language,
                "references": texts["caption"],
            }
            for language, texts in entry.items()
            if isinstance(texts, dict) and "caption" in texts
        ]
    return records


def refcoco(folder, split, subset):
    """RefCOCO, + and g: `refcoco/refs(unc).p`, `refcoco/instances.json`.

    A sample is one referring expression of one object. The expressions are a
    pickle, from which only lists, dicts, numbers and text are read.
    """
    codec = needed("pycocotools.mask", "Masks of RefCOCO")
    name, _, who = subset.rstrip(")").partition("(")
    data = read_json(folder, f"{name}/instances.json")
    with open(in_archive(folder, f"{name}/refs({who}).p"), "rb") as file:
        refs = _PlainUnpickler(file, encoding="latin-1").load()
    images = {entry["id"]: entry for entry in data["images"]}
    objects = {entry["id"]: entry for entry in data["annotations"]}
    records = []
    for ref in refs:
        if ref["split"] != split:
            continue
        image, found = images[ref["image_id"]], objects[ref["ann_id"]]
        height, width = image["height"], image["width"]
        x, y, w, h = found["bbox"]
        runs = found["segmentation"]
        if isinstance(runs, list):
            runs = codec.merge(codec.frPyObjects(runs, height, width))
        box = (y / height, x / width, (y + h) / height, (x + w) / width)
        records += [
            {
                "id": f"{ref['ref_id']}-{entry['sent_id']}",
                "images": str(folder / "train2014" / image["file_name"]),
                "sentence": entry["sent"],
                "boxes": box,
                "masks": runs,
            }
            for entry in ref["sentences"]
        ]
    return records


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle plain values only: any other pickle could run code."""

    def find_class(self, module, name):
        raise ValueError(
            "A file of expressions holds plain values. Received: "
            f"{module}.{name}, which is not read."
        )


LAYOUTS = {
    reader.__name__: reader
    for reader in (
        *(vqav2, textvqa, docvqa, chartqa, science_qa),
        *(nlvr2, tallyqa, coco_captions, xm3600, refcoco),
    )
}
