"""Folders as the programs write them that people annotate pictures with."""

import json
import os

import pytest
from PIL import Image

from keras_paligemma.data import open_source


def picture(folder):
    folder.mkdir(parents=True)
    Image.new("RGB", (80, 40)).save(folder / "a.jpg")


def test_exports_of_label_studio(tmp_path):
    """YOLO beside notes.json, and VOC with pictures in `images`."""
    picture(tmp_path / "yolo" / "images")
    (tmp_path / "yolo" / "labels").mkdir()
    (tmp_path / "yolo" / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "yolo" / "classes.txt").write_text("cat\n")
    (tmp_path / "yolo" / "notes.json").write_text('{"categories": []}')
    picture(tmp_path / "voc" / "images")
    (tmp_path / "voc" / "Annotations").mkdir()
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(
        """<annotation><folder>images</folder><filename>a</filename><size>
        <width>80</width><height>40</height></size><object><name>cat</name>
        <bndbox><xmin>30</xmin><ymin>10</ymin><xmax>50</xmax><ymax>30</ymax>
        </bndbox></object></annotation>"""
    )
    for kind in ("yolo", "voc"):
        (example,) = open_source(tmp_path / kind)
        assert example["images"] == str(tmp_path / kind / "images" / "a.jpg")
        assert example["responses"].endswith("<loc0639> cat")


@pytest.mark.parametrize(
    "place", ["val2017", "images", "images/val2017", ".", "annotations"]
)
def test_pictures_of_coco_are_found(tmp_path, place):
    picture(tmp_path / "coco" / place)
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    file.parent.mkdir(exist_ok=True)
    image = {"id": 1, "file_name": "a.jpg", "height": 40, "width": 80}
    found = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 10, 20, 20]}
    names = [{"id": 1, "name": "cat"}]
    data = {"images": [image], "annotations": [found], "categories": names}
    file.write_text(json.dumps(data))
    (example,) = open_source(tmp_path / "coco", split="val")
    assert os.path.samefile(
        example["images"], tmp_path / "coco" / place / "a.jpg"
    )


def test_the_path_of_yolo_may_be_of_another_machine(tmp_path):
    picture(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "data.yaml").write_text(
        "path: /content/none\ntrain: images\nnames: [cat]\n"
    )
    (example,) = open_source(tmp_path)
    assert example["images"] == str(tmp_path / "images" / "a.jpg")


def test_links_to_folders_are_followed(tmp_path):
    """As of a data set that was made of others; a loop of links ends."""
    other, home = tmp_path / "other", tmp_path / "yolo"
    picture(other / "images")
    (other / "images" / "folder.jpg").mkdir()
    (other / "labels").mkdir()
    (other / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    for kind in ("images", "labels"):
        (home / kind).mkdir(parents=True)
        (home / kind / "other").symlink_to(other / kind)
    (home / "images" / "loop").symlink_to(home)
    (home / "classes.txt").write_text("cat\n")
    source = open_source(home)
    (example,) = source
    assert example["images"] == str(home / "images" / "other" / "a.jpg")
    assert not source.left_out


@pytest.mark.parametrize("part", ["", "part"])
def test_linked_folders_of_voc(tmp_path, part):
    """All of the XML files, or a part of them, are in another place."""
    other, home = tmp_path / "other", tmp_path / "voc"
    picture(other / "JPEGImages")
    (other / "Annotations").mkdir()
    (other / "Annotations" / "a.xml").write_text(
        "<annotation><size><width>80</width><height>40</height></size>"
        "<object><name>cat</name><bndbox><xmin>20</xmin><ymin>10</ymin>"
        "<xmax>60</xmax><ymax>30</ymax></bndbox></object></annotation>"
    )
    for kind in ("Annotations", "JPEGImages"):
        link = home / kind / part
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(other / kind)
    (example,) = open_source(home)
    assert example["images"] == str(home / "JPEGImages" / part / "a.jpg")
    assert example["prompts"] == "detect cat"


def test_homes_of_unknown_users_do_not_exist():
    with pytest.raises(ValueError, match="does not exist.*~nobody_of_this_n"):
        open_source("~nobody_of_this_name/a")
