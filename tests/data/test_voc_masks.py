"""Pascal VOC's mask pictures, read and written."""

import doctest
import json

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data import ExampleError
from keras_paligemma.data import convert
from keras_paligemma.data import open_objects
from keras_paligemma.data import open_source
from keras_paligemma.data import voc_masks
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import Picture
from keras_paligemma.tasks.masks import from_rle
from keras_paligemma.tasks.masks import from_segmentation
from keras_paligemma.tasks.masks import to_rle

SIZE = (20, 30)
# A label, and (y1, x1, y2, x2) in pixels.
CAT, DOG, OWL = (
    ("cat", 2, 3, 12, 9),
    ("dog", 4, 12, 16, 20),
    ("cat", 0, 22, 9, 29),
)
OBJECT = (
    "<object><name>{}</name><bndbox><ymin>{}</ymin><xmin>{}</xmin>"
    "<ymax>{}</ymax><xmax>{}</xmax></bndbox></object>"
)


def mask_of(mark):
    """Return a mask of the box without its upper left quarter."""
    _, y1, x1, y2, x2 = mark
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    mask[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = False
    return mask


def write_xml(folder, marks, name="a"):
    """Write the XML of a picture, and the picture."""
    for part in ("Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(folder / "JPEGImages" / f"{name}.jpg")
    text = "".join(OBJECT.format(*mark) for mark in marks)
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>30</width>"
        f"<height>20</height></size>{text}</annotation>"
    )


def write_map(folder, values, colours=False, name="a.png"):
    """Write a picture of indices, or one of the colours of VOC's palette."""
    folder.mkdir(exist_ok=True)
    picture = Image.fromarray(np.asarray(values, "uint8"))
    picture.putpalette(np.ravel(voc_masks.palette()).tolist())
    (picture.convert("RGB") if colours else picture).save(folder / name)


def values_of(marks, numbers):
    values = np.zeros(SIZE, int)
    # A border around all objects, as in the challenge.
    values[0, :] = values[:, 0] = 255
    for mark, number in zip(marks, numbers, strict=True):
        values[mask_of(mark)] = number
    return values


def masks_in(folder):
    (picture,) = open_objects(folder).pictures
    return [
        from_rle(annotation.segmentation) if annotation.has_mask() else None
        for annotation in picture.annotations
    ]


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(voc_masks)
    assert result.attempted and not result.failed


def test_the_palette_is_that_of_the_challenge():
    """The development kit's documentation lists its first colours."""
    palette = voc_masks.palette()
    assert len(set(palette)) == 256
    assert palette[1:8] == [
        *((128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)),
        *((128, 0, 128), (0, 128, 128), (128, 128, 128)),
    ]
    assert palette[15] == (192, 128, 128)
    assert palette[20] == (0, 64, 128)


@pytest.mark.parametrize("colours", [False, True])
def test_each_object_has_the_pixels_of_its_number(tmp_path, colours):
    marks = [CAT, DOG, OWL]
    write_xml(tmp_path, marks)
    values = values_of(marks, (1, 2, 3))
    write_map(tmp_path / "SegmentationObject", values, colours)
    for mark, mask in zip(marks, masks_in(tmp_path), strict=True):
        np.testing.assert_array_equal(mask, mask_of(mark))
    source = open_source(tmp_path, task="segment")
    assert not source.left_out
    assert source[0]["prompts"] == "segment cat ; dog"
    assert source[0]["responses"].count("<seg") == 3 * 16
    # Boxes alone need no masks, so the mask pictures are not opened.
    (tmp_path / "SegmentationObject" / "a.png").write_bytes(b"")
    assert not open_source(tmp_path).left_out


def test_numbers_that_fit_no_object_are_counted(tmp_path):
    """The second object has no pixels, and the third is another object's."""
    marks = [CAT, DOG, OWL]
    write_xml(tmp_path, marks)
    values = values_of([CAT, DOG, OWL], (1, 3, 4))
    write_map(tmp_path / "SegmentationObject", values)
    objects = open_objects(tmp_path)
    assert objects.skipped == {
        "masks of no object": 1,
        "masks outside of the boxes of their objects": 1,
    }
    first, *others = masks_in(tmp_path)
    np.testing.assert_array_equal(first, mask_of(CAT))
    assert others == [None, None]
    source = open_source(tmp_path, task="segment")
    with pytest.raises(ExampleError, match="a.xml: object 3: There is no mask"):
        source[0]


@pytest.mark.parametrize(
    "content", [b"no picture", "colours of nothing", "grey with alpha"]
)
def test_pictures_that_are_no_masks_are_counted(tmp_path, content):
    write_xml(tmp_path, [CAT])
    (tmp_path / "SegmentationObject").mkdir()
    path = tmp_path / "SegmentationObject" / "a.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "colours of nothing":
        Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(path)
    else:
        Image.new("LA", SIZE[::-1], (1, 255)).save(path)
    objects = open_objects(tmp_path)
    assert objects.skipped == {"pictures of masks that cannot be read": 1}
    assert masks_in(tmp_path) == [None]


def test_a_mask_of_another_size_is_an_error_of_its_object(tmp_path):
    write_xml(tmp_path, [CAT])
    folder = tmp_path / "SegmentationObject"
    write_map(folder, values_of([CAT], [1])[:, :25])
    with pytest.raises(ExampleError, match="a.xml: object 1: .*another size"):
        open_source(tmp_path, task="segment")[0]
    made = convert(tmp_path, tmp_path / "out.json", "coco")
    assert "another size" in made.skipped[0]


@pytest.mark.parametrize("listed", ["", "challenge", "cvat"])
@pytest.mark.parametrize("colours", [False, True])
def test_classes_where_there_are_no_numbers_of_objects(
    tmp_path, colours, listed
):
    """Classes come from a list of names, from CVAT's, or from VOC's own."""
    marks = [CAT, DOG, OWL]
    write_xml(tmp_path, marks)
    numbers = {"": (8, 12, 8), "challenge": (2, 1, 2), "cvat": (1, 2, 1)}
    values = values_of(marks, numbers[listed])
    write_map(tmp_path / "SegmentationClass", values, colours)
    lines = {
        "challenge": ["dog", "cat"],
        "cvat": ["# label", "background:0,0,0::", "cat:128,0,0::", "dog:::"],
    }
    if listed:
        text = "\n".join(lines[listed])
        (tmp_path / "labelmap.txt").write_text(text)
    objects = open_objects(tmp_path)
    assert objects.skipped == {"masks of classes that several objects share": 1}
    assert set(objects.classes) == {"cat", "dog"}
    cat, dog, owl = masks_in(tmp_path)
    assert cat is None and owl is None
    np.testing.assert_array_equal(dog, mask_of(DOG))


def test_colours_of_a_list(tmp_path):
    write_xml(tmp_path, [CAT])
    (tmp_path / "SegmentationClass").mkdir()
    pixels = np.zeros((*SIZE, 3), "uint8")
    pixels[mask_of(CAT)] = 9, 8, 7
    path = tmp_path / "SegmentationClass" / "a.png"
    Image.fromarray(pixels).save(path)
    text = "background:0,0,0::\ncat:9,8,7::\n"
    (tmp_path / "labelmap.txt").write_text(text)
    np.testing.assert_array_equal(masks_in(tmp_path)[0], mask_of(CAT))


def test_classes_of_unknown_numbers_are_counted(tmp_path):
    write_xml(tmp_path, [("lynx", *CAT[1:])])
    values = values_of([CAT], [1])
    write_map(tmp_path / "SegmentationClass", values)
    objects = open_objects(tmp_path)
    assert objects.skipped == {"pictures of classes without a labelmap.txt": 1}
    (tmp_path / "labelmap.txt").write_text("background\nlynx\n")
    write_map(tmp_path / "SegmentationClass", values_of([CAT], [2]))
    assert open_objects(tmp_path).skipped == {"masks of no object": 1}


def test_masks_are_trained_on_where_they_are_listed(tmp_path):
    for name in ("a", "b"):
        write_xml(tmp_path, [CAT], name)
    write_map(tmp_path / "SegmentationObject", values_of([CAT], [1]))
    for kind, names in (("Main", "a\nb\n"), ("Segmentation", "a\n")):
        (tmp_path / "ImageSets" / kind).mkdir(parents=True)
        (tmp_path / "ImageSets" / kind / "train.txt").write_text(names)
    assert len(open_source(tmp_path)) == 2
    assert len(open_source(tmp_path, task="segment")) == 1
    assert len(open_objects(tmp_path).pictures) == 2


@pytest.fixture
def coco(tmp_path):
    """Write overlapping masks, a run length, and a box without a mask."""
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.jpg")
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "b.jpg")
    big = [0.0, 0.0, 20.0, 0.0, 20.0, 15.0, 0.0, 15.0]
    small = {"segmentation": to_rle(mask_of(DOG)), "bbox": [12, 4, 8, 12]}
    marks = [
        {"segmentation": [big], "bbox": [0, 0, 20, 15], "category_id": 1},
        {**small, "category_id": 2},
        {"bbox": [1, 1, 3, 3], "category_id": 1},
    ]
    marks = [{"id": i, "image_id": 1, **mark} for i, mark in enumerate(marks)]
    sizes = {"height": 20, "width": 30}
    data = {
        "images": [
            {"id": 1, "file_name": "a.jpg", **sizes},
            {"id": 2, "file_name": "b.jpg", **sizes},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": marks,
    }
    (tmp_path / "in.json").write_text(json.dumps(data))
    return tmp_path / "in.json"


def test_masks_are_written_as_the_challenge_does(coco, tmp_path):
    made = convert(coco, tmp_path / "voc", "voc")
    assert made.lost == {
        "polygons written as pixels": 1,
        "masks cut where they overlap": 1,
    }
    with Image.open(made.path / "SegmentationObject" / "a.png") as picture:
        assert picture.mode == "P"
        assert picture.getpalette()[3:6] == [128, 0, 0]
        objects = np.asarray(picture)
    with Image.open(made.path / "SegmentationClass" / "a.png") as picture:
        classes = np.asarray(picture)
    right = np.zeros(SIZE, int)
    right[:15, :20] = 1
    right[mask_of(DOG)] = 2
    np.testing.assert_array_equal(objects, right)
    np.testing.assert_array_equal(classes, right)
    assert (made.path / "labelmap.txt").read_text().split("\n")[1:4] == [
        *("background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::")
    ]
    lists = made.path / "ImageSets"
    assert (lists / "Main" / "train.txt").read_text() == "a\nb\n"
    assert (lists / "Segmentation" / "train.txt").read_text() == "a\n"
    folder = made.path / "Annotations"
    assert "<segmented>1<" in (folder / "a.xml").read_text()
    assert "<segmented>0<" in (folder / "b.xml").read_text()
    again = convert(made.path, tmp_path / "again.json", "coco")
    assert not again.lost
    first, _ = open_objects(again.path).pictures
    cat, dog, box = first.annotations
    assert not box.has_mask()
    for annotation, value in ((cat, 1), (dog, 2)):
        mask = from_segmentation(annotation.segmentation, SIZE)
        np.testing.assert_array_equal(mask, right == value)


def test_more_objects_than_numbers(tmp_path):
    mask = np.zeros((20, 30), bool)
    marks = []
    for number in range(256):
        one = mask.copy()
        one.flat[number] = True
        box = (0, 0, 20, 30)
        marks.append(Annotation("cat", box, to_rle(one)))
    picture = Picture("a.jpg", marks, (20, 30))
    lost = voc_masks.write_masks(picture, tmp_path, "a", ["cat"])
    assert +lost == {"masks beyond 254 in a picture": 2}
    with Image.open(tmp_path / "SegmentationObject" / "a.png") as written:
        values = np.asarray(written)
    assert sorted(set(values.flat)) == list(range(255))
