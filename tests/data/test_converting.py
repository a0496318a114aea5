"""One data set converted to every format, and errors in data sets."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from keras_paligemma import cli
from keras_paligemma import presets
from keras_paligemma.data import ExampleError
from keras_paligemma.data import convert
from keras_paligemma.data import open_objects
from keras_paligemma.data import open_source
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import object_of
from keras_paligemma.tasks import published_codecs
from keras_paligemma.tasks.masks import from_segmentation
from keras_paligemma.tasks.masks import to_rle
from keras_paligemma.training import Settings
from keras_paligemma.training.run import open_data

SIZE = (40, 80)
SQUARE = [10.25, 5.5, 30.0, 5.5, 30.0, 25.0, 10.25, 25.0]
CORNER = [60.0, 30.0, 80.0, 30.0, 80.0, 40.0]
RING = np.zeros(SIZE, bool)
RING[8:20, 40:60] = True
RING[12:16, 46:54] = False


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", SIZE[::-1]).save(folder / name)


def box_of(polygon):
    x, y = polygon[::2], polygon[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


@pytest.fixture
def coco(tmp_path):
    """Write a COCO file in its own folder: two pictures, one is empty."""
    home = tmp_path / "coco"
    pictures(home / "images", "a.jpg", "b.jpg")
    common = {"iscrowd": 0, "image_id": 7}
    ring = {"segmentation": to_rle(RING), "bbox": [40, 8, 20, 12]}
    marks = [
        {"segmentation": [SQUARE], "bbox": box_of(SQUARE), "category_id": 9},
        {"segmentation": [CORNER], "bbox": box_of(CORNER), "category_id": 2},
        {**ring, "category_id": 9, "attributes": {"hidden": True}},
    ]
    marks = [common | mark | {"id": 5 + i} for i, mark in enumerate(marks)]
    sizes = {"height": 40, "width": 80}
    data = {
        "info": {"year": 2026},
        "images": [
            {"id": 7, "file_name": "images/a.jpg", **sizes, "license": 3},
            {"id": 4, "file_name": "images/b.jpg", **sizes},
        ],
        "categories": [
            {"id": 9, "name": "cat", "supercategory": "animal"},
            {"id": 2, "name": "dog"},
            {"id": 5, "name": "hat"},
        ],
        "annotations": marks,
    }
    (home / "labels.json").write_text(json.dumps(data))
    return home / "labels.json"


def masks_of(objects):
    found = {}
    for picture in objects.pictures:
        size = picture.size or SIZE
        scale = 1 if picture.size else np.array(SIZE[::-1])
        for number, annotation in enumerate(picture.annotations):
            mask = annotation.segmentation
            if isinstance(mask, list):
                mask = [np.reshape(p, (-1, 2)) * scale for p in mask]
            found[picture.name[-5:], number] = from_segmentation(mask, size)
    return found


def boxes_of(objects):
    """Return label and box in pixels of each object of each picture."""
    return {
        picture.name[-5:]: [
            (
                annotation.label,
                *np.multiply(annotation.box, 1 if picture.size else SIZE * 2),
            )
            for annotation in picture.annotations
        ]
        for picture in objects.pictures
    }


def check_boxes(found, wanted, atol):
    assert found.keys() == wanted.keys()
    for name, objects in wanted.items():
        labels = [row[0] for row in found[name]]
        assert labels == [item[0] for item in objects]
        edges = [row[1:] for row in found[name]]
        np.testing.assert_allclose(
            edges, [item[1:] for item in objects], rtol=0, atol=atol
        )


@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_relative_links_to_pictures_are_followed(coco, tmp_path, to):
    """As in the cache of Hugging Face: snapshots are links to blobs."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    wanted = set()
    for picture in [*coco.parent.rglob("*.jpg")]:
        blob = blobs / picture.stem
        wanted.add(picture.read_bytes())
        picture.rename(blob)
        picture.symlink_to(os.path.relpath(blob, picture.parent))
    made = convert(coco, tmp_path / "deep" / "x" / to, to)
    assert not made.lost.get("pictures that are missing")
    folder = tmp_path / "deep" / "x" / to
    assert {p.read_bytes() for p in folder.rglob("*.jpg")} == wanted


def test_coco_comes_back_as_it_was(coco, tmp_path):
    made = convert(coco, tmp_path / "again.json", "coco")
    assert (made.pictures, made.objects) == (2, 3)
    assert not made.lost and not made.skipped
    before, after = (json.loads(p.read_text()) for p in (coco, made.path))
    for image in before["images"]:
        image["file_name"] = f"coco/{image['file_name']}"
    areas = [each.pop("area") for each in after["annotations"]]
    assert areas == [385.125, 100, RING.sum()]
    for annotation, other in zip(
        before["annotations"], after["annotations"], strict=True
    ):
        assert other == annotation | {"bbox": pytest.approx(annotation["bbox"])}
    del before["annotations"], after["annotations"]
    assert after == before
    # An independent reader.
    from pycocotools.coco import COCO

    assert sorted(COCO(str(made.path)).getCatIds()) == [2, 5, 9]


# The boxes, in pixels, that each format keeps, and the losses it reports.
@pytest.mark.parametrize(
    ("to", "task", "target", "atol", "lost"),
    [
        (
            *("yolo", "segment", "yolo", 1e-7),
            {
                "fields of other formats": 2,
                "masks in parts, which a line of no width joins": 1,
            },
        ),
        (
            *("yolo", "detect", "yolo", 1e-7),
            {"fields of other formats": 2, "masks": 3},
        ),
        (
            *("voc", "segment", "voc", 0),
            {"fields of other formats": 2, "polygons written as pixels": 2},
        ),
        (
            *("jsonl", "detect", "train.jsonl", 0.5 * 80 / 1023),
            {
                "fields of other formats": 2,
                "masks": 3,
                "edges rounded to 1/1023 of the side": 3,
                "pictures without an object": 1,
                "classes without an object": 1,
            },
        ),
        (
            *("jsonl", "segment", "train.jsonl", 0.5 * 80 / 1023),
            {
                "fields of other formats": 2,
                "masks as 16 codes": 3,
                "edges rounded to 1/1023 of the side": 3,
                "pictures without an object": 1,
                "classes without an object": 1,
            },
        ),
    ],
)
def test_round_trips(coco, tmp_path, to, task, target, atol, lost):
    made = convert(coco, tmp_path / target, to, task=task)
    assert made.lost == lost and not made.skipped and made.objects == 3
    wanted, found = open_objects(coco), open_objects(made.path)
    classes = list(wanted.classes)
    if to == "jsonl":
        classes.remove("hat")
    assert list(found.classes) == classes
    right = boxes_of(wanted)
    if to == "jsonl":
        del right["b.jpg"]
        # Objects are grouped by class, as in answers.
        right["a.jpg"] = [right["a.jpg"][i] for i in (0, 2, 1)]
    check_boxes(boxes_of(found), right, atol)
    if task == "segment":
        least = {"yolo": 0.97, "voc": 1, "jsonl": 0.55}[to]
        for key, mask in masks_of(found).items():
            place = (key[0], (0, 2, 1)[key[1]]) if to == "jsonl" else key
            true = masks_of(wanted)[place]
            assert (mask & true).sum() / (mask | true).sum() >= least, key
    # Converting back gives the same boxes.
    again = convert(made.path, tmp_path / "back.json", "coco")
    check_boxes(boxes_of(open_objects(again.path)), boxes_of(found), 1e-9)
    source = open_source(made.path, task=task or "detect")
    assert source[0]["prompts"].endswith(" cat ; dog")
    with Image.open(source[0]["images"]) as picture:
        assert picture.size == SIZE[::-1]


def test_masks_are_kept_where_all_have_one(coco, tmp_path):
    made = convert(coco, tmp_path / "yolo", "yolo")
    text = (made.path / "labels" / "a.txt").read_text()
    assert [len(line.split()) for line in text.splitlines()][:2] == [9, 7]
    assert (made.path / "images" / "b.jpg").is_file()
    assert (made.path / "labels" / "b.txt").read_text() == ""


class Whole:
    """A codec of one mask, which fills its box."""

    def encode_mask(self, mask):
        return [5] * 16

    def decode(self, codes):
        return np.ones((len(codes), 64, 64), "float32")


def test_masks_are_of_the_codec_that_is_given(coco, tmp_path):
    example = open_source(coco, task="segment", codec=Whole())[0]
    assert example["responses"].count("<seg005>") == 3 * 16
    target = tmp_path / "lines.jsonl"
    made = convert(coco, target, "jsonl", task="segment", codec=Whole())
    assert made.path.read_text().count("<seg005>") == 3 * 16
    masks = masks_of(open_objects(made.path, codec=Whole()))
    boxes = [
        round(mark["bbox"][2])
        for mark in json.loads(coco.read_text())["annotations"]
    ]
    assert [mask.any(0).sum() for mask in masks.values()] == boxes
    assert all(
        mask[mask.any(1)][:, mask.any(0)].all() for mask in masks.values()
    )


def test_scores_and_crowds(coco, tmp_path):
    data = json.loads(coco.read_text())
    data["annotations"][0]["score"] = 0.25
    data["annotations"][1]["iscrowd"] = 1
    coco.write_text(json.dumps(data))
    made = convert(coco, tmp_path / "voc", "voc")
    assert made.lost["scores"] == made.lost["marks of crowds"] == 1
    made = convert(coco, tmp_path / "yolo", "yolo", task="detect")
    assert made.lost["marks of crowds"] == 1
    (picture, _) = open_objects(made.path).pictures
    assert [annotation.score for annotation in picture.annotations] == [
        0.25,
        None,
        None,
    ]
    made = convert(coco, tmp_path / "again.json", "coco")
    (picture, _) = open_objects(made.path).pictures
    assert [annotation.is_crowd for annotation in picture.annotations] == [
        0,
        1,
        0,
    ]
    assert picture.annotations[0].score == 0.25


def test_fields_of_voc(tmp_path):
    folder = tmp_path / "train"
    pictures(folder, "a.jpg")
    text = """<annotation><filename>a.jpg</filename><size><width>80</width>
      <height>40</height><depth>3</depth></size><object><name>cat</name>
      <pose>Left</pose><difficult>1</difficult><bndbox><xmin>1.5</xmin>
      <ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>
    """
    (folder / "a.xml").write_text(text)
    assert open_source(tmp_path)[0]["prompts"] == "detect cat"
    middle = convert(tmp_path, tmp_path / "a.json", "coco")
    made = convert(middle.path, tmp_path / "voc", "voc")
    ((mark,),) = [
        picture.annotations for picture in open_objects(made.path).pictures
    ]
    assert mark.box == (2, 1.5, 40, 30)
    assert mark.extra == {"pose": "Left", "difficult": 1}
    assert not made.lost


def test_odd_names_of_classes_come_back_from_voc(coco, tmp_path):
    data = json.loads(coco.read_text())
    names = ["traffic:light", "#hash", "cat", " lead"]
    data["categories"] = [
        {"id": number, "name": name} for number, name in enumerate(names, 1)
    ]
    for annotation, number in zip(data["annotations"], (1, 2, 4), strict=True):
        annotation["category_id"] = number
    coco.write_text(json.dumps(data))
    made = convert(coco, tmp_path / "voc", "voc")
    assert made.lost["blanks around names"] == 1
    found = open_objects(made.path)
    assert [*found.classes] == [name.strip() for name in names]


@pytest.mark.parametrize("to", ["coco", "jsonl", "yolo", "voc"])
def test_half_of_a_character_in_the_name_of_a_class(coco, tmp_path, to):
    """JSON and YAML hold it as an escape; other formats name it."""
    coco.write_text(coco.read_text().replace('"dog"', '"dog \\ud83d"'))
    target = tmp_path / "x.json"
    if to in ("coco", "yolo"):
        found = open_objects(convert(coco, target, to).path).classes
        assert [*found] == ["cat", "dog \ud83d", "hat"]
        return
    with pytest.raises(ValueError, match=r"lone surrogate.*dog \\ud83d"):
        convert(coco, target, to)
    assert {path.name for path in tmp_path.iterdir()} == {"coco"}


def test_blanks_in_names_of_pictures_come_back_from_voc(coco, tmp_path):
    coco.write_text(coco.read_text().replace("a.jpg", "cat 1.jpg"))
    image = coco.parent / "images" / "a.jpg"
    image.rename(image.with_name("cat 1.jpg"))
    made = convert(coco, tmp_path / "voc", "voc")
    (example,) = open_source(made.path)
    assert example["images"] == str(made.path / "JPEGImages" / "cat 1.jpg")
    # The lines of the challenge's lists of a class end in 1, 0 or -1.
    listed = made.path / "ImageSets" / "Main" / "cat_train.txt"
    listed.write_text("cat 1  1\nb -1\n")
    found = open_objects(made.path, split="cat_train").pictures
    assert [picture.name for picture in found] == ["cat 1.jpg", "b.jpg"]


YOLO_LINES = {
    "0 0.5 0.5 0.25 0.5": "",
    "0 0.1 0.1 0.4 0.1 0.4 0.4": "",
    "7 0.5 0.5 0.25 0.5": "class is not in the data set.*0 to 1.*'7 0.5",
    "0.5 0.5 0.5 0.25 0.5": "class is not in the data set",
    "cat 0.5 0.5 0.25 0.5": "no numbers.*'cat",
    "0 0.5 nan 0.25 0.5": "no numbers",
    "0 0.5": "1 numbers",
    "0 0.9 0.5 0.5 0.5": "box does not fit its picture",
}


@pytest.fixture
def yolo(tmp_path):
    """Write Roboflow's layout, with an extra level of folders."""
    home = tmp_path / "yolo"
    pictures(home / "train" / "images", "a.jpg", "b.jpg")
    (home / "train" / "labels").mkdir()
    (home / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnames: ['cat', 'dog']\n"
    )
    label = home / "train" / "labels" / "a.txt"
    label.write_text("".join(f"{line}\n" for line in YOLO_LINES))
    (label.parent / "gone.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    return home


def test_what_is_wrong_in_text_files(yolo, tmp_path):
    source = open_source(yolo)
    assert source.left_out == {
        "labels of missing pictures": 1,
        "pictures without an object": 1,
    }
    with pytest.raises(ExampleError) as raised:
        source[0]
    assert raised.match(r"yolo, train/labels/a.txt: line 8: .*\(6 of its")
    right = raised.value.remainder["responses"]
    assert right.count("cat") == 2 and right.startswith("<loc0256><loc0384>")
    made = convert(yolo, tmp_path / "out.json", "coco", task="detect")
    assert made.objects == 2 and made.lost == {"labels of missing pictures": 1}
    wanted = [(i, m) for i, m in enumerate(YOLO_LINES.values(), 1) if m]
    for (line, message), told in zip(wanted, made.skipped, strict=True):
        assert f"a.txt: line {line}: " in told
        assert re.search(message, told)


def test_splits_and_names_of_yolo(yolo, tmp_path):
    with pytest.raises(ValueError, match="not there.*valid/images"):
        open_source(yolo, split="val")
    with pytest.raises(ValueError, match=r"no split.*\['train', 'val'\].*test"):
        open_source(yolo, split="test")
    head = yolo / "data.yaml"
    for names in ("3", "{0: cat, 2: dog}"):
        head.write_text(f"train: train/images\nnames: {names}\n")
        with pytest.raises(ValueError, match="no names of classes"):
            open_source(yolo)
    head.write_text("train: [\n")
    with pytest.raises(ValueError, match="data.yaml is no YAML"):
        open_source(head)
    label = yolo / "train" / "labels" / "a.txt"
    head.write_text("train: train/images\nnames: [cat]\n")
    label.write_bytes(b"\xff")
    made = convert(yolo, yolo / "a.json", "coco")
    assert "a.txt: The labels cannot be read" in made.skipped[0]
    made.path.unlink()
    # Label Studio and CVAT write a list of names instead of YAML.
    head.unlink()
    (yolo / "train" / "classes.txt").write_text("owl\ncat\n")
    (yolo / "train" / "labels" / "a.txt").write_text("1 0.5 0.5 0.25 0.5")
    assert open_source(yolo)[0]["responses"].endswith(" cat")
    # The picture is removed after its labels were listed.
    objects = open_source(yolo)
    (yolo / "train" / "images" / "a.jpg").unlink()
    with pytest.raises(ExampleError, match="a.txt: The picture cannot be read"):
        objects[0]


@pytest.mark.parametrize("names", ["[no, 007, ~]", "{0: no, 1: 007, 2: ~}"])
def test_names_of_yolo_are_text(yolo, names):
    """YAML reads no as False, 007 as 7, and ~ as None."""
    (yolo / "data.yaml").write_text(f"train: train/images\nnames: {names}\n")
    assert open_objects(yolo).classes == ("no", "007", "~")


def test_turned_pictures_of_yolo(yolo):
    exif = Image.Exif()
    exif[0x0112] = 6
    place = yolo / "train" / "images" / "a.jpg"
    Image.new("RGB", (40, 80)).save(place, exif=exif)
    (yolo / "train" / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    source = open_source(yolo)
    (one,) = source.objects(0)
    assert one.box == (0.25, 0.375, 0.75, 0.625)
    made = convert(yolo, yolo / "a.json", "coco")
    assert json.loads(made.path.read_text())["images"][0]["width"] == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [70, 0, 20, 10]}, "annotation 5: The box does not fit"),
        ({"bbox": None}, "annotation 5: The box does not fit COCO's format"),
        ({"segmentation": [[1, 2]]}, "annotation 5: Polygon 0 is none"),
        ({"segmentation": {"size": [1, 1], "counts": [1]}}, "another size"),
        ({"segmentation": {"size": SIZE, "counts": [3200]}}, "empty mask"),
    ],
)
def test_bad_objects_of_coco_are_skipped(coco, tmp_path, change, message):
    data = json.loads(coco.read_text())
    data["annotations"][0] |= change
    coco.write_text(json.dumps(data))
    made = convert(coco, tmp_path / "out.json", "coco")
    (told,) = made.skipped
    assert f"{coco}, image 7: " in told and message in told
    assert made.objects == 2


def test_a_box_that_sticks_out_is_written_clipped(coco, tmp_path):
    data = json.loads(coco.read_text())
    data["annotations"][0]["bbox"] = [-0.5, 5, 30, 20]
    coco.write_text(json.dumps(data))
    made = convert(coco, f"{tmp_path}/new/out.json", "coco")
    assert made.lost == {"boxes clipped": 1} and not made.skipped
    found = json.loads(made.path.read_text())["annotations"][0]
    assert found["bbox"] == [0, 5, 29.5, 20]


def test_pictures_that_pillow_takes_for_an_attack(coco, yolo, monkeypatch):
    """Its error is no ValueError. COCO's file has their sizes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    made = convert(coco, coco.parent / "a.jsonl", "jsonl", task="detect")
    assert made.pictures == 2 and not made.skipped
    made = convert(yolo, yolo / "a.json", "coco")
    assert made.pictures == 0
    assert all("exceeds limit of 2000 pixels" in line for line in made.skipped)


def test_bad_pictures_are_skipped(coco, tmp_path):
    Image.new("RGB", (40, 80)).save(coco.parent / "images" / "a.jpg")
    (coco.parent / "images" / "b.jpg").unlink()
    made = convert(coco, tmp_path / "yolo", "yolo")
    assert made.pictures == 1 and made.lost == {"pictures that are missing": 1}
    assert "image 7: The picture is not of the size" in made.skipped[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "a.xml: The file is no XML"),
        ("<annotation/>", "a.xml: The picture lacks its size"),
    ],
)
def test_bad_xml(tmp_path, text, message):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "a.xml").write_text(text)
    made = convert(tmp_path, tmp_path / "out.json", "coco")
    assert message in made.skipped[0] and made.pictures == 0


@pytest.mark.parametrize(
    "text", ["", "<?xml version='1.0' encoding='gb2312'?><annotation/>"]
)
def test_unreadable_xml_is_no_picture_without_objects(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    source = open_source(tmp_path)
    with pytest.raises(ExampleError, match="a.xml: The file is no XML"):
        source[0]


def test_unreadable_text_files_are_no_pictures_without_objects(yolo):
    label = yolo / "train" / "labels" / "b.txt"
    label.write_bytes("0 0.5 0.5 0.25 0.5 caf\xe9".encode("latin-1"))
    source = open_source(yolo)
    assert "pictures without an object" not in source.left_out
    with pytest.raises(ExampleError, match="b.txt: The labels cannot be read"):
        source[1]


def test_folders_are_recognised(coco, tmp_path):
    home = tmp_path / "export"
    for split in ("train", "valid"):
        pictures(home / split, "a.jpg")
        text = coco.read_text().replace("images/a.jpg", f"{split}.jpg")
        (home / split / "_annotations.coco.json").write_text(text)
    for split, folder in (("train", "train"), ("val", "valid")):
        source = open_source(home, split=split)
        assert source[0]["images"] == str(home / folder / f"{folder}.jpg")
    assert type(open_source(coco.parent)).__name__ == "ObjectSource"
    with pytest.raises(ValueError, match="holds no data set.*'test'.*none"):
        open_source(home, split="test")
    with pytest.raises(ValueError, match="does not exist.*gone"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match="no known format.*a.jpg"):
        open_source(home / "train" / "a.jpg")
    line = {"image": "a.jpg", "prefix": "caption en", "suffix": "a cat"}
    file = home / "train" / "train.jsonl"
    file.write_text(json.dumps(line))
    assert open_source(file)[0]["responses"] == "a cat"
    with pytest.raises(ValueError, match="jsonl: .*coco: .*Name the file"):
        open_source(home)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    file.write_text(json.dumps({"image": "a.jpg", "conversations": turns}))
    assert open_source(file)[0]["responses"] == "!"
    with pytest.raises(ValueError, match="no objects on pictures"):
        open_objects(file)


def test_listed_pictures_that_are_missing(yolo):
    head = "train: train.txt\nnames: [cat, dog]\n"
    (yolo / "data.yaml").write_text(head)
    names = "train/images/b.jpg\ndata/train/images/b.jpg\n"
    (yolo / "train.txt").write_text(names)
    source = open_source(yolo)
    assert source.left_out["pictures without an object"] == 1
    with pytest.raises(ExampleError, match="neither.*data/train/images/b.jpg"):
        source[0]


def test_objects_that_lines_cannot_hold(coco, tmp_path):
    data = json.loads(coco.read_text())
    del data["annotations"][0]["segmentation"]
    data["categories"][1]["name"] = "dog; big"
    coco.write_text(json.dumps(data))
    made = convert(coco, tmp_path / "a.jsonl", "jsonl", task="segment")
    assert made.lost["pictures with objects that cannot be written"] == 1
    (line,) = made.path.read_text().splitlines()
    assert json.loads(line)["prefix"] == "segment cat"
    assert {path.name for path in tmp_path.iterdir()} == {"coco", "a.jsonl"}
    with pytest.raises(ValueError, match="has no classes"):
        open_source(made.path, classes=["cat"])


def test_several_files_of_coco(coco):
    folder = coco.parent / "annotations"
    folder.mkdir()
    for name in ("instances_train2017", "captions_train2017", "instances_val"):
        (folder / f"{name}.json").write_text(coco.read_text())
    coco.unlink()
    source, other = (
        open_source(folder.parent, split=split) for split in ("train", "val")
    )
    assert source.data.path.stem == "instances_train2017"
    assert other.data.path.stem == "instances_val"


def test_lines_that_are_no_objects_are_counted(tmp_path):
    pictures(tmp_path, "a.jpg")
    box = "<loc0000><loc0000><loc0512><loc1023>"
    rows = [
        ("a.jpg", "detect cat ; owl", f"{box} cat ; <loc0001> owl"),
        ("a.jpg", "detect hat", ""),
        ("a.jpg", "detect hat", ["", f"{box} hat"]),
        ("a.jpg", "caption en", "a cat"),
        ("gone.jpg", "detect cat", f"{box} cat"),
    ]
    names = ("image", "prefix", "suffix")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "{"]))
    objects = open_objects(tmp_path / "x.jsonl")
    assert objects.classes == ("cat", "owl", "hat")
    assert [len(picture.annotations) for picture in objects.pictures] == [1]
    assert objects.skipped == {
        "parts of answers that are no object": 1,
        "answers beside the first of a line": 1,
        "lines that do not ask for objects": 1,
        "lines of missing pictures": 1,
        "damaged lines": 1,
    }


def test_targets_are_checked_first(coco, tmp_path):
    with pytest.raises(ValueError, match="in use"):
        convert(coco, coco, "coco")
    with pytest.raises(ValueError, match="no such format.*'tfrecord'"):
        convert(coco, tmp_path / "x", "tfrecord")
    with pytest.raises(ValueError, match="task 'detect'.*task='pose'"):
        convert(coco, tmp_path / "x", "yolo", task="pose")
    with pytest.raises(ValueError, match="one file.*x"):
        convert(coco, tmp_path / "x", "jsonl")
    data = json.loads(coco.read_text())
    data["images"][1]["file_name"] = "images/a.png"
    coco.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="one file of labels.*a.jpg.*a.png"):
        convert(coco, tmp_path / "x", "yolo")
    assert not (tmp_path / "x").exists()


def test_from_the_command_line(yolo, tmp_path):
    target = tmp_path / "out.json"
    arguments = ["data", "convert", str(yolo), str(target), "--to", "coco"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0] == f"{target}: 2 pictures, 2 objects"
    assert lines[1] == "lost: labels of missing pictures: 1"
    assert sum(line.startswith("skipped: ") for line in lines) == 6
    settings = Settings("", str(target), "", task="detect")
    assert open_data(settings, target)[0] == open_source(target)[0]


def test_masks_of_published_sizes_need_their_codec(coco, monkeypatch):
    """A fine-tune of one would learn the nano preset's codes."""
    monkeypatch.setitem(published_codecs.SIZES, 128, "3B")
    settings = Settings("pali_gemma2_nano_112", str(coco), "", task="segment")
    with pytest.raises(ValueError, match="of the size 3B .*--codec"):
        open_data(settings, coco)
    codec = presets.locate(settings.preset) / "mask_codec.npz"
    settings = dataclasses.replace(settings, codec=str(codec))
    wanted = open_source(coco, task="segment")
    assert open_data(settings, coco)[0] == wanted[0]


def test_shares_of_the_sides_have_no_size_in_pixels():
    assert Picture("a.png", size=(4, 6.5)).known_size() == (4, 6.5)
    with pytest.raises(ValueError, match="'a.png' are shares of its sides"):
        Picture("a.png").known_size()
    with pytest.raises(ValueError, match="There is no box"):
        object_of(Annotation("cat", None), (4, 6))
