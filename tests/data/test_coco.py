"""COCO: boxes and masks as text, and annotations that do not fit."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data import COCOSource
from keras_paligemma.data import ExampleError
from keras_paligemma.tasks.boxes import parse_boxes

SIZE = (40, 80)


def annotation(id, image, category, box, **fields):
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "iscrowd": 0,
        **fields,
    }


@pytest.fixture
def write(tmp_path):
    """Function that writes annotations of three pictures of three classes."""

    def write(*annotations, **changes):
        data = {
            "images": [
                {"id": id, "file_name": f"{id}.jpg", "height": 40, "width": 80}
                for id in (7, 3, 5)
            ],
            "categories": [
                {"id": 4, "name": "cat"},
                {"id": 2, "name": "dog"},
                {"id": 9, "name": "hat"},
            ],
            "annotations": annotations,
            **changes,
        }
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(data))
        return path

    return write


BOXES = [
    annotation(11, 3, 2, [0, 0, 80, 40]),
    annotation(12, 7, 4, [20, 10, 20, 30]),
    annotation(13, 3, 4, [40, 0, 40, 20]),
    annotation(14, 3, 2, [0, 20, 80, 20]),
    annotation(15, 7, 2, [0, 0, 9, 9], iscrowd=1),
]


def test_boxes(write, tmp_path):
    source = COCOSource(write(*BOXES), "pictures")
    assert list(source) == [
        {
            "images": "pictures/7.jpg",
            "prompts": "detect cat",
            "responses": "<loc0256><loc0256><loc1023><loc0512> cat",
        },
        {
            "images": "pictures/3.jpg",
            "prompts": "detect cat ; dog",
            "responses": "<loc0000><loc0512><loc0512><loc1023> cat ; "
            "<loc0000><loc0000><loc1023><loc1023> dog ; "
            "<loc0512><loc0000><loc1023><loc1023> dog",
        },
    ]
    boxes = parse_boxes(source[1]["responses"])
    assert [box.label for box in boxes] == ["cat", "dog", "dog"]
    assert source.where(1) == f"{tmp_path / 'instances.json'}, image 3"


def test_chosen_classes(write):
    path = write(*BOXES)
    source = COCOSource(path, "", classes=["dog", "hat"])
    assert [one["images"] for one in source] == ["3.jpg"]
    assert source[0]["prompts"] == "detect dog ; hat"
    assert source[0]["responses"].count("dog") == 2
    assert "cat" not in source[0]["responses"]
    source = COCOSource(path, "", classes=["dog"], keep_empty=True)
    assert [one["images"] for one in source] == ["7.jpg", "3.jpg", "5.jpg"]
    assert source[0]["responses"] == ""
    with pytest.raises(ValueError, match=r"no class \['cow'\].*'cat', 'dog'"):
        COCOSource(path, "", classes=["cow", "dog"])
    with pytest.raises(ValueError, match="nothing to ask for"):
        COCOSource(path, "", keep_empty=True)


@pytest.mark.parametrize(
    "box",
    [[70, 0, 20, 10], [-3, 0, 9, 9], [9, 9, -4, 2], None, [1, 2], ["a"] * 4],
)
def test_box_outside(write, box):
    source = COCOSource(write(BOXES[1], annotation(16, 3, 2, box)), "")
    assert source[0]["prompts"] == "detect cat"
    message = "instances.json, image 3: annotation 16: The box does not fit"
    with pytest.raises(ExampleError, match=message):
        source[1]


def test_files_that_are_not_coco(write, tmp_path):
    with pytest.raises(ValueError, match="does not exist.*none.json"):
        COCOSource(tmp_path / "none.json", "")
    path = write(annotation(1, 99, 2, [0, 0, 1, 1]))
    with pytest.raises(ValueError, match="annotation 1: .*image_id=99"):
        COCOSource(path, "")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no COCO file"):
        COCOSource(path, "")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        COCOSource(path, "")
    path = write(BOXES[1], images=[{"id": 7, "file_name": "a"}])
    with pytest.raises(ExampleError, match="image 7: The picture lacks"):
        COCOSource(path, "")[0]
    assert len(COCOSource(write(), "")) == 0


def test_masks(write):
    seen = []

    def encode(mask):
        seen.append(mask)
        return np.arange(16) * 8

    # A triangle of 20 × 20, a square of 4 in run lengths, the same packed.
    polygon = [[20, 10, 40, 10, 20, 30]]
    runs = {"size": SIZE, "counts": [6 * 40 + 8, 4] + [36, 4] * 3 + [2828]}
    box = [6, 8, 4, 4]
    path = write(
        annotation(1, 7, 4, [20, 10, 20, 20], segmentation=polygon),
        annotation(2, 7, 2, box, segmentation=runs),
        annotation(3, 7, 9, box, segmentation=_pack(runs)),
    )
    source = COCOSource(path, "", "segment", encode_mask=encode)
    codes = "".join(f"<seg{8 * i:03d}>" for i in range(16))
    example = source[0]
    assert example["prompts"] == "segment cat ; dog ; hat"
    assert example["responses"] == (
        f"<loc0256><loc0256><loc0767><loc0512>{codes} cat ; "
        f"<loc0205><loc0077><loc0307><loc0128>{codes} dog ; "
        f"<loc0205><loc0077><loc0307><loc0128>{codes} hat"
    )
    triangle, square, packed = seen
    assert triangle.shape == (20, 20) and triangle.dtype == bool
    assert triangle[0, 0] and not triangle[-1, -1]
    assert triangle.mean() == pytest.approx(0.5, abs=0.06)
    assert square.shape == (4, 4) and square.all()
    np.testing.assert_array_equal(square, packed)


def _pack(runs):
    from pycocotools import mask

    packed = mask.frPyObjects(runs, *SIZE)
    return {"size": SIZE, "counts": packed["counts"].decode()}


@pytest.mark.parametrize(
    "segmentation, codes, message",
    [
        (None, range(16), "annotation 1: There is no mask"),
        ([[60, 30, 70, 30, 70, 39]], range(16), "empty within its box"),
        ({"size": [4, 4], "counts": [0, 16]}, range(16), "another size|Inval"),
        ([[0, 0, 9, 0, 9, 9]], range(15), "returned no mask codes"),
        ([[0, 0, 9, 0, 9, 9]], range(120, 136), "returned no mask codes"),
    ],
)
def test_bad_masks(write, segmentation, codes, message):
    path = write(annotation(1, 7, 4, [0, 0, 9, 9], segmentation=segmentation))
    source = COCOSource(path, "", "segment", encode_mask=lambda mask: codes)
    with pytest.raises(ExampleError, match=message):
        source[0]


def test_masks_need_an_encoder(write):
    with pytest.raises(ValueError, match="`encode_mask`.*16 integers"):
        COCOSource(write(*BOXES), "", "segment")
    with pytest.raises(ValueError, match="`task` must be"):
        COCOSource(write(*BOXES), "", "caption")


@pytest.mark.parametrize(
    "kind, entry",
    [
        ("images", {"id": 1, "file_name": "a.jpg", "height": 4, "width": 8}),
        ("categories", {"id": 1, "name": "cat"}),
    ],
)
def test_twins_of_an_id(write, kind, entry):
    with pytest.raises(ValueError, match=f"several {kind} have the same id"):
        COCOSource(write(**{kind: [entry, entry]}), "images")


@pytest.mark.parametrize(
    "size, orientation, fits",
    [
        ((80, 40), 1, True),
        ((160, 81), 1, True),
        ((40, 80), 6, True),
        ((80, 40), 6, False),
        ((80, 40), 9, True),  # No orientation: Pillow does not turn it.
        ((40, 40), 1, False),
    ],
)
def test_sizes_of_files(write, tmp_path, size, orientation, fits):
    """Boxes belong to the picture as its EXIF turns it, at any scale."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(tmp_path / "7.jpg", exif=exif)
    source = COCOSource(write(BOXES[1]), tmp_path)
    if fits:
        assert source[0]["responses"].endswith("cat")
        return
    with pytest.raises(ExampleError, match="image 7.*not of the size"):
        source[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"annotations": None}, "'annotations' is no list.*None"),
        ({"images": {"a": 1}}, "'images' is no list.*{'a': 1}"),
        ({"images": [{"id": 1}, {}]}, r"images\[1\] lacks.*'id'.*{}"),
        ({"images": [{"id": []}]}, "another type.*unhashable"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] lacks.*'name'"),
        ({"annotations": [{"id": 1, "category_id": 4}]}, r"\[0\].*'image_id'"),
        ({"annotations": [BOXES[0], None]}, r"annotations\[1\].*None"),
    ],
)
def test_entries_of_another_kind(write, change, words):
    with pytest.raises(ValueError, match=f"instances.json is no.*{words}"):
        COCOSource(write(**change), "images")
