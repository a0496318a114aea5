"""COCO: boxes and masks as text, and invalid annotations."""

import json

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.data import Batches
from keras_paligemma.data import COCOSource
from keras_paligemma.data import ExampleError
from keras_paligemma.data.object_set import size_of_file
from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import MaskCodec

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
    """Return a function that writes annotations of three pictures."""

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
]
CROWD = {"size": SIZE, "counts": [0, 4, 3196]}


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
    boxes = read_objects(source[1]["responses"])
    assert [box.label for box in boxes] == ["cat", "dog", "dog"]
    assert source.where(1) == f"{tmp_path / 'instances.json'}, image 3"


def test_blanks_around_a_class_are_in_no_label(write):
    """Otherwise no answer would be of the class, when answers are scored."""
    categories = [{"id": 2, "name": " cat "}, {"id": 4, "name": "dog"}]
    source = COCOSource(write(BOXES[0], categories=categories), "")
    labels = [item.label for item in source.objects(0)]
    assert labels == [i.label for i in read_objects(source[0]["responses"])]


def test_chosen_classes(write):
    path = write(*BOXES)
    source = COCOSource(path, "", classes=["dog", "hat"])
    assert [example["images"] for example in source] == ["3.jpg"]
    assert source[0]["prompts"] == "detect dog ; hat"
    assert source[0]["responses"].count("dog") == 2
    assert "cat" not in source[0]["responses"]
    source = COCOSource(path, "", classes=["dog"], keep_empty=True)
    assert [example["images"] for example in source] == [
        "7.jpg",
        "3.jpg",
        "5.jpg",
    ]
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


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_crowds_are_objects(write, task):
    """CVAT and Datumaro mark every brush mask as a crowd."""
    path = write(
        annotation(1, 7, 4, [20, 10, 20, 20], segmentation=[[20, 10, 40, 30]]),
        annotation(2, 7, 2, [0, 0, 1, 4], iscrowd=1, segmentation=CROWD),
        annotation(3, 3, 2, [0, 0, 1, 4], iscrowd=1, segmentation=CROWD),
    )
    options = {"task": task, "encode_mask": lambda mask: range(16)}
    if task == "segment":
        path.write_text(path.read_text().replace("40, 30]", "40, 30, 20, 30]"))
    source = COCOSource(path, "", **options)
    assert [example["prompts"] for example in source] == [
        f"{task} cat ; dog",
        f"{task} dog",
    ]
    assert source[1]["responses"].startswith("<loc0000><loc0000><loc0102>")
    assert source.left_out == {"pictures without an object": 1}
    source = COCOSource(path, "", keep_crowds=False, **options)
    assert [example["prompts"] for example in source] == [f"{task} cat"]
    assert source.left_out == {"crowds": 2, "pictures without an object": 2}
    assert "2 crowds left out" in repr(source)


def test_crowds_without_a_mask_are_told(write):
    path = write(
        BOXES[1],
        annotation(15, 3, 2, [0, 0, 9, 9], iscrowd=1),
        annotation(16, 3, 2, [0, 0, 9, 9], iscrowd=1, segmentation=[]),
        annotation(17, 7, 2, [0, 0, 9, 9], iscrowd=1, segmentation=CROWD),
    )
    with pytest.warns(UserWarning, match="without a mask are left out, 2 of 4"):
        source = COCOSource(path, "")
    assert [example["prompts"] for example in source] == ["detect cat ; dog"]
    assert source.left_out["crowds without a mask"] == 2
    assert COCOSource(path, "", classes=["cat"]).left_out == {
        "objects of other classes": 3,
        "pictures without an object": 2,
    }


# In pictures of 40 × 80 pixels, one pixel is more than 1 %.
@pytest.mark.parametrize(
    "box, tokens",
    [
        ([60, 20, 21, 21], "<loc0512><loc0767><loc1023><loc1023>"),
        ([-1, -0.5, 41, 20.5], "<loc0000><loc0000><loc0512><loc0512>"),
        ([0, 0, 81, 41], "<loc0000><loc0000><loc1023><loc1023>"),
    ],
)
def test_a_pixel_outside_is_clipped(write, box, tokens):
    source = COCOSource(write(BOXES[1], annotation(16, 3, 2, box)), "")
    assert source[1]["responses"] == f"{tokens} dog"
    assert source.clipped == 1 and "1 boxes clipped" in repr(source)


def test_a_hundredth_outside_is_clipped(write):
    image = {"id": 7, "file_name": "a", "height": 3000, "width": 1000}
    for bottom, clipped in ((3030, 1), (3000.0000001, 0)):
        path = write(annotation(1, 7, 4, [0, 0, 9, bottom]), images=[image])
        source = COCOSource(path, "")
        assert source.clipped == clipped
        assert "<loc1023><loc0009> cat" in source[0]["responses"]
    path = write(annotation(1, 7, 4, [0, 0, 1011, 9]), images=[image])
    with pytest.raises(ExampleError, match="1 %.*outside='clip'"):
        COCOSource(path, "")[0]


def test_what_becomes_of_boxes_further_outside(write):
    path = write(
        BOXES[1],
        annotation(15, 3, 2, [70, 0, 20, 10]),
        annotation(16, 3, 4, [0, 0, 40, 20]),
        annotation(17, 7, 2, [80.5, 0, 20, 10]),
    )
    source = COCOSource(path, "", outside="clip")
    assert "<loc0895><loc0256><loc1023> dog" in source[1]["responses"]
    # Clipping the last box would leave nothing.
    with pytest.raises(ExampleError, match="annotation 17: The box does not"):
        source[0]
    source = COCOSource(path, "", outside="drop")
    assert [example["prompts"] for example in source] == [
        "detect cat",
        "detect cat",
    ]
    assert source.left_out["boxes outside of their pictures"] == 2
    with pytest.raises(ValueError, match="`outside` must be.*'ignore'"):
        COCOSource(path, "", outside="ignore")


def test_a_bad_object_loses_no_picture(write):
    """With `skip_errors`, bad objects are counted and the others are used."""
    path = write(
        BOXES[1],
        annotation(15, 3, 2, [70, 0, 20, 10]),
        annotation(16, 3, 4, [0, 0, 40, 20]),
        annotation(17, 5, 4, None),
        annotation(18, 5, 2, [-9, 0, 40, 20]),
    )
    source = COCOSource(path, "")
    with pytest.raises(ExampleError, match="image 3: annotation 15") as raised:
        source[1]
    assert raised.value.remainder["prompts"] == "detect cat"
    assert raised.value.remainder["responses"].endswith("<loc0512> cat")
    with pytest.raises(ExampleError, match="2 of its objects") as raised:
        source[2]
    assert raised.value.remainder is None
    asked = COCOSource(path, "", classes=["dog", "cat"])
    with pytest.raises(ExampleError) as raised:
        asked[1]
    assert raised.value.remainder["prompts"] == "detect dog ; cat"
    seen = []

    def preprocessor(example):
        seen.append(example["prompts"])
        return {"images": np.ones(1)}, np.ones(1), np.ones(1)

    batches = Batches(
        source, preprocessor, 3, shuffle=False, epochs=1, skip_errors=True
    )
    with pytest.warns(UserWarning) as told:
        ((_, _, weights),) = batches
    assert weights[:, 0].tolist() == [1, 1, 0]
    assert seen.count("detect cat") == len(seen)
    assert (batches.skipped, batches.incomplete) == (1, 1)
    assert set(batches.problems) == {1, 2}
    assert [str(warning.message).split(":")[0] for warning in told] == [
        "Examples used in part so far",
        "Examples skipped so far",
    ]
    with pytest.raises(ExampleError, match="image 3: annotation 15"):
        next(iter(Batches(source, preprocessor, 3, shuffle=False)))


def test_files_that_are_not_coco(write, tmp_path):
    with pytest.raises(ValueError, match="does not exist.*none.json"):
        COCOSource(tmp_path / "none.json", "")
    path = write(annotation(1, 99, 2, [0, 0, 1, 1]))
    with pytest.raises(ValueError, match="annotation 1: .*image_id=99"):
        COCOSource(path, "")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no COCO file"):
        COCOSource(path, "")
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="not JSON"):
            COCOSource(path, "")
    path = write(BOXES[1], images=[{"id": 7, "file_name": "a"}])
    with pytest.raises(ExampleError, match="image 7: The picture lacks"):
        COCOSource(path, "")[0]
    image = {"id": 7, "file_name": "a", "width": 9, "height": None}
    path = write(BOXES[1], images=[image])
    with pytest.raises(ExampleError, match="image 7: .*size.*'height': None"):
        COCOSource(path, "")[0]
    path = write(annotation(1, "7", 4, [0, 0, 1, 1]))
    with pytest.raises(ValueError, match="image_id='7'.*another type"):
        COCOSource(path, "")
    path = write(annotation(1, 7, 4, None))
    with pytest.raises(ExampleError, match="annotation 1: .*'bbox'.*None"):
        COCOSource(path, "")[0]
    assert len(COCOSource(write(), "")) == 0


def test_masks(write):
    seen = []

    def encode(mask):
        seen.append(mask)
        return np.arange(16) * 8

    # A triangle of 20 × 20, a square of 4 × 4 in run lengths, and the same run
    # lengths compressed.
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


def test_masks_become_codes_of_the_embedded_codec(write):
    polygon = [[20, 10, 40, 10, 20, 30]]
    mark = annotation(1, 7, 4, [20, 10, 20, 20], segmentation=polygon)
    source = COCOSource(write(mark), "", "segment")
    codec = MaskCodec.embedded()
    (found,) = read_objects(source[0]["responses"], codec)
    (wanted,) = source.objects(0)
    first, second = found.mask_in(SIZE), wanted.mask_in(SIZE)
    assert (first & second).sum() / (first | second).sum() > 0.8
    own = codec.encode_mask(wanted.mask)
    asked = COCOSource(write(mark), "", "segment", encode_mask=lambda _: own)
    assert asked[0] == source[0]
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
        ((80, 40), 9, True),  # Not a valid orientation: Pillow ignores it.
        ((40, 40), 1, False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_sizes_of_files(write, tmp_path, size, orientation, fits, kind):
    """Boxes refer to the picture after its EXIF rotation, at any scale."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(tmp_path / "7.jpg", kind, exif=exif)
    read = read_image(tmp_path / "7.jpg").shape[:2]
    assert size_of_file(tmp_path / "7.jpg") == read
    source = COCOSource(write(BOXES[1]), tmp_path)
    if fits:
        assert source[0]["responses"].endswith("cat")
        return
    with pytest.raises(ExampleError, match="image 7.*not of the size"):
        source[0]


def test_a_crowd_is_no_text(write):
    """The text "0" is true, and would make each object a crowd."""
    path = write(annotation(15, 3, 2, [0, 0, 9, 9], iscrowd="0"))
    source = COCOSource(path, "")
    with pytest.raises(ExampleError, match="annotation 15: .*crowd.*'0'"):
        source[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"annotations": None}, "'annotations' is no list.*None"),
        ({"images": {"a": 1}}, "'images' is no list.*{'a': 1}"),
        ({"images": [{"id": 1}, {}]}, r"images\[1\] lacks.*'id'.*{}"),
        ({"images": [{"id": []}]}, "another type.*unhashable"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] lacks.*'name'"),
        ({"categories": [{"id": 1, "name": 2}]}, r"categories\[0\].*no text"),
        ({"annotations": [{"id": 1, "category_id": 4}]}, r"\[0\].*'image_id'"),
        ({"annotations": [BOXES[0], None]}, r"annotations\[1\].*None"),
    ],
)
def test_entries_of_another_kind(write, change, words):
    with pytest.raises(ValueError, match=f"instances.json is no.*{words}"):
        COCOSource(write(**change), "images")
