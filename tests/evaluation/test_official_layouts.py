"""Readers of official archives, on synthetic archives of three samples."""

import hashlib
import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.evaluation import TrainingSource
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from keras_paligemma.evaluation.run_folder import record_of
from keras_paligemma.preprocessing.images import read_image
from tests.helpers.benchmark_data import chartqa_human
from tests.helpers.benchmark_data import put
from tests.helpers.benchmark_data import refcoco_testa
from tests.helpers.oracle import Oracle


def vqav2(folder):
    prefix = "v2_OpenEnded_mscoco_val2014_questions.json"
    ids = [262148000, 262148001, 393225000]
    questions = [
        {
            "image_id": id // 1000,
            "question": f"Which of {id}?",
            "question_id": id,
        }
        for id in ids
    ]
    put(folder, prefix, {"questions": questions})
    answers = [
        {
            "question_id": id,
            "answer_type": "other",
            "answers": [
                {
                    "answer": f"{id}",
                    "answer_confidence": "yes",
                    "answer_id": n + 1,
                }
                for n in range(10)
            ],
        }
        for id in ids
    ]
    put(folder, "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    for id in ids:
        put(folder, f"val2014/COCO_val2014_{id // 1000:012d}.jpg", (8, 6))
    # The order of TensorFlow Datasets is a hash of split and key.
    order = sorted(
        ids, key=lambda id: hashlib.md5(f"validation{id}".encode()).hexdigest()
    )
    return [
        (str(id), f"answer en Which of {id}?", [str(id)] * 10) for id in order
    ]


def textvqa(folder):
    data = [
        {
            **{"question": f"what is {n}?", "image_id": f"ab{n}"},
            **{"question_id": n, "answers": [f"a{n}"] * 10},
            **{"image_classes": [], "set_name": "val"},
        }
        for n in range(3)
    ]
    put(folder, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    for n in range(3):
        put(folder, f"train_images/ab{n}.jpg", (8, 6))
    return [
        (str(n), f"answer en what is {n}?", [f"a{n}"] * 10) for n in range(3)
    ]


def docvqa(folder):
    data = [
        {
            **{"questionId": n, "question": f"total {n}?", "docId": 1},
            **{"image": f"documents/page_{n}.png", "answers": ["1", "one"]},
        }
        for n in (7, 8, 9)
    ]
    put(folder, "val_v1.0_withQT.json", {"dataset_name": "…", "data": data})
    for n in (7, 8, 9):
        put(folder, f"documents/page_{n}.png", (8, 6))
    return [(str(n), f"total {n}?", ["1", "one"]) for n in (7, 8, 9)]


def science_qa(folder):
    problem = {
        **{"question": "Which is hot?", "choices": ["ice", "fire"]},
        **{"answer": 1, "hint": "", "image": "image.png"},
    }
    problems = {str(n): problem for n in (1, 2, 3)}
    problems |= {"4": problem | {"image": None}}
    problems["3"] = problem | {"hint": "Feel it."}
    put(folder, "problems.json", problems)
    put(folder, "pid_splits.json", {"test": list("1234"), "train": []})
    for id in "123":
        put(folder, f"test/{id}/image.png", (8, 6))
    prompt = (
        "Question: Which is hot?\nContext: {}\nOptions: (A) ice, (B) fire\n"
        "Answer:"
    )
    hints = {"1": "N/A", "2": "N/A", "3": "Feel it."}
    return [
        (id, prompt.format(hint), "The answer is B.")
        for id, hint in hints.items()
    ]


def nlvr2(folder):
    ids = ["test1-0-0-0", "test1-0-0-1", "test1-7-1-0"]
    data = [
        {
            **{"identifier": id, "label": "True", "sentence": f"Of {id}."},
            **{"left_url": "…", "right_url": "…"},
        }
        for id in ids
    ]
    put(folder, "data/test1.json", data)
    for pair in ("0-0", "7-1"):
        for n in (0, 1):
            put(folder, f"test1/test1-{pair}-img{n}.png", (8, 6))
    return [(id, f"answer en Of {id}.", "True") for id in ids]


def tallyqa_simple(folder):
    data = [
        {
            **{"image": f"VG_100K_2/{n}.jpg", "answer": n, "issimple": n < 2},
            **{"question": f"How many {n}?", "question_id": 30 + n},
            **{"image_id": n, "data_source": "…"},
        }
        for n in range(3)
    ]
    put(folder, "test.json", data)
    for n in range(3):
        put(folder, f"VG_100K_2/{n}.jpg", (8, 6))
    return [(str(30 + n), f"answer en How many {n}?", str(n)) for n in range(3)]


def coco_captions(folder):
    images = [
        {
            **{"cocoid": n, "filepath": "val2014", "split": split},
            "filename": f"COCO_val2014_{n:012d}.jpg",
            "sentences": [{"raw": f"A {n}."}, {"raw": f"The {n}."}],
        }
        for n, split in ((1, "val"), (2, "test"), (3, "val"), (4, "val"))
    ]
    put(folder, "dataset_coco.json", {"images": images, "dataset": "coco"})
    for n in (1, 3, 4):
        put(folder, f"val2014/COCO_val2014_{n:012d}.jpg", (8, 6))
    return [(str(n), "caption en", [f"A {n}.", f"The {n}."]) for n in (1, 3, 4)]


def xm3600_en(folder):
    data = [
        {
            "image/key": f"k{n}",
            "image/locale": "fi",
            "en": {"caption": [f"a {n}"], "caption/tokenized": [f"a {n}"]},
            "fi": {"caption": [f"yksi {n}"], "caption/tokenized": ["…"]},
        }
        for n in range(3)
    ]
    put(folder, "captions.jsonl", data)
    for n in range(3):
        put(folder, f"images/k{n}.jpg", (8, 6))
    return [(f"k{n}_en", "caption en", [f"a {n}"]) for n in range(3)]


LAYOUTS = [
    *(vqav2, textvqa, docvqa, chartqa_human, science_qa, nlvr2),
    *(tallyqa_simple, coco_captions, xm3600_en, refcoco_testa),
]


@pytest.mark.parametrize("make", LAYOUTS)
def test_official_layout(make, tmp_path):
    wanted = make(tmp_path)
    benchmark = find_benchmark(make.__name__)
    samples = open_samples(benchmark, tmp_path)
    right = {"cider": "references", "refcoco": "boxes"}
    right = right.get(benchmark.metric, "answers")
    found = [
        (sample.id, sample.prompt, sample.truth[right])
        for sample in (samples[n] for n in range(len(samples)))
    ]
    assert found == wanted
    # The rows of a metric would hold the pictures of all samples.
    assert not samples.truth(0).keys() & {"id", "images"}
    assert samples.missing_pictures() == []
    assert len(samples[0].images) == 2 or benchmark.pictures == 1
    # The same file can be used for training.
    if benchmark.response is not None:
        example = TrainingSource(samples)[0]
        assert example["responses"] == wanted[0][2]


def test_coco_captions_without_karpathys_split(tmp_path):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    captions = [
        {"image_id": n, "caption": text, "id": 7}
        for n, text in ((2, "a"), (1, "b"), (2, "c"))
    ]
    data = {"images": images, "annotations": captions}
    put(tmp_path, "annotations/captions_val2014.json", data)
    samples = open_samples(find_benchmark("coco_captions"), tmp_path)
    found = [samples.unopened(n) for n in range(2)]
    assert [each.truth["references"] for each in found] == [["b"], ["a", "c"]]
    assert found[1].images == str(tmp_path / "val2014" / "2.jpg")


def test_textvqa_turns_the_pictures_that_lie_on_their_side(tmp_path):
    """The original undoes what OpenImages lists, by `tf.image.rot90`."""
    textvqa(tmp_path)
    pixels = np.zeros((8, 16, 3), "uint8")
    pixels[:, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "train_images" / "ab1.jpg")
    benchmark = find_benchmark("textvqa")
    whole = record_of_rows(open_samples(benchmark, tmp_path))
    lines = ["ImageID,Subset,Rotation", "ab0,train,0.0", "ab1,train,90.0"]
    lines += ["ab2,train,", "of another set,train,270.0"]
    rotated = tmp_path / "train_images" / "rotation.csv"
    rotated.write_text("\n".join(lines) + "\n")
    samples = open_samples(benchmark, tmp_path)
    found = read_image(samples[1].images)
    assert found.shape == (16, 8, 3)
    assert found[:7].min() > 200 and found[9:].max() < 50
    assert [read_image(samples[n].images).shape for n in (0, 2)] == [
        *((6, 8, 3),) * 2
    ]
    # Answers to the other picture are not taken for those to this one.
    turned = record_of_rows(samples)
    assert [a == b for a, b in zip(whole, turned, strict=True)] == [
        *(True, False, True)
    ]


def record_of_rows(samples):
    return record_of(samples.benchmark, samples, Oracle(samples, "abc")).rows


def test_nlvr2_in_directories(tmp_path):
    line = {"identifier": "train-1-2-0", "label": "True", "sentence": "One."}
    put(tmp_path, "data/train.json", [])
    text = json.dumps(line | {"directory": 30}) + "\n"
    (tmp_path / "data" / "train.json").write_text(text)
    samples = open_samples(find_benchmark("nlvr2"), tmp_path, "train")
    home = tmp_path / "images" / "train" / "30"
    assert samples.unopened(0).images == [
        str(home / f"train-1-2-img{n}.png") for n in (0, 1)
    ]


def test_refcoco_masks_and_pickles(tmp_path):
    from pycocotools import mask as codec

    refcoco_testa(tmp_path)
    benchmark = find_benchmark("refcoco_testa")
    mask = codec.decode(open_samples(benchmark, tmp_path)[0].truth["masks"])
    wanted = np.zeros((20, 40), "uint8")
    wanted[5:15, 10:20] = 1
    np.testing.assert_array_equal(mask, wanted)
    with open(tmp_path / "refcoco" / "refs(unc).p", "wb") as file:
        pickle.dump([print], file)
    with pytest.raises(
        ValueError, match="Received: .*print, which is not read"
    ):
        open_samples(benchmark, tmp_path)


def test_minival_is_the_originals(tmp_path):
    """The hash is that of TensorFlow Datasets' shuffler."""
    from tensorflow_datasets.core import hashing

    wanted = [row[0] for row in vqav2(tmp_path)]
    hasher = hashing.Hasher("validation")
    assert wanted == sorted(wanted, key=lambda id: hasher.hash_key(int(id)))
    assert wanted != sorted(wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("docvqa", "val_v1.0_withQT.json or val_v1.0.json"),
        ("nlvr2", "data/test1.json"),
        ("xm3600", "captions.jsonl"),
        ("refcoco_val", "refcoco/instances.json"),
        ("gqa", "TensorFlow Datasets' 'gqa'.*cs.stanford.edu"),
        ("icdar2015", "samples.jsonl, a line a sample.*rrc.cvc.uab.es"),
    ],
)
def test_missing_files_are_named(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_samples(find_benchmark(name), tmp_path)
    with pytest.raises(ValueError, match="does not exist.*Get the data"):
        open_samples(find_benchmark(name), tmp_path / "none")


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (science_qa, "val", r"pid_splits.json.*\['test', 'train'\].*'val'"),
        (xm3600_en, "de", "captions.jsonl holds all languages.*'de'"),
    ],
)
def test_splits_that_lack_are_named(make, split, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_samples(find_benchmark(make.__name__), tmp_path, split)


@pytest.mark.parametrize(
    ("make", "name"),
    [(nlvr2, "data/test1.json"), (xm3600_en, "captions.jsonl")],
)
def test_lines_end_at_line_feeds_alone(make, name, tmp_path):
    wanted = make(tmp_path)
    file = tmp_path / name
    text = file.read_text().replace("\n", "\r\n\r\n")
    text = re.sub("Of |a ", "\\g<0>\u2028", text)
    file.write_bytes(text.encode("utf-8-sig"))
    samples = open_samples(find_benchmark(make.__name__), tmp_path)
    assert samples.ids == [row[0] for row in wanted]
    for last in ("{", "[" * 100_000):
        file.write_text(text + last, "utf-8")
        where = f"{file.name}, line 7, is not JSON"
        with pytest.raises(ValueError, match=where):
            open_samples(find_benchmark(make.__name__), tmp_path)


def test_languages_that_lack_are_named(tmp_path):
    xm3600_en(tmp_path)
    with pytest.raises(ValueError, match=r"Missing: \['ar', 'bn', 'cs'"):
        open_samples(find_benchmark("xm3600"), tmp_path)


def test_homes_of_unknown_users_do_not_exist():
    with pytest.raises(ValueError, match="not exist.*~nobody_of_this_name"):
        open_samples(find_benchmark("coco_captions"), "~nobody_of_this_name/a")
