"""Folders as the programs write them that people annotate pictures with."""

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
