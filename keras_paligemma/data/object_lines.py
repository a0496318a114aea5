"""Read and write objects in JSONL: answers to `detect` and `segment`."""

import json
import re
from collections import Counter
from pathlib import Path

from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import frames_of
from keras_paligemma.data.jsonl import JSONLSource
from keras_paligemma.data.object_set import Annotation
from keras_paligemma.data.object_set import ObjectSet
from keras_paligemma.data.object_set import Picture
from keras_paligemma.data.object_set import has_fields
from keras_paligemma.data.object_set import relative_name
from keras_paligemma.data.object_set import relative_path
from keras_paligemma.data.object_set import size_of_file
from keras_paligemma.data.object_source import ObjectSource
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.masks import to_rle

_PROMPT = re.compile(r"\s*(?:detect|segment)\s+(.+)", re.DOTALL)


def read(
    path: Path,
    image_folder: str | None = None,
    codec: MaskCodec | None = None,
) -> ObjectSet:
    """Read the objects of a JSONL file's answers.

    Sizes are read from the pictures, since masks are resized to them. Lines
    about the same picture are merged.

    Args:
        path: path of the JSONL file.
        image_folder: str, folder that pictures are relative to; the file's
            folder if `None`.
        codec: `MaskCodec` that encoded the masks; the embedded one if `None`.

    Returns:
        `ObjectSet`. `skipped` counts lines with other prompts, damaged lines,
        lines of pictures that cannot be read, answers beside the first of a
        line, and parts of answers that are not objects.

    Raises:
        ValueError: if the file does not exist.
        ImportError: if pycocotools is not installed.
    """
    source = JSONLSource(path, image_folder, allow_empty=True)
    codec = codec or MaskCodec.embedded()
    skipped, found, sizes = Counter(), {}, {}
    classes = {}
    for index in range(len(source)):
        try:
            example = source[index]
        except ExampleError:
            skipped["damaged lines"] += 1
            continue
        asked = _PROMPT.fullmatch(example["prompts"])
        image = example["images"]
        if asked is None or len(frames_of(image)) > 1:
            skipped["lines that do not ask for objects"] += 1
            continue
        if image not in sizes:
            try:
                sizes[image] = size_of_file(image)
            except ValueError:
                skipped["lines of missing pictures"] += 1
                continue
        labels = [
            label.strip() for label in asked[1].split(";") if label.strip()
        ]
        classes |= dict.fromkeys(labels)
        answers = example["responses"]
        answers = answers if isinstance(answers, list) else [answers]
        answer, *others = answers
        skipped["answers beside the first of a line"] += len(others)
        objects = read_objects(answer, codec, labels)
        skipped["parts of answers that are no object"] += len(objects.skipped)
        place = f"line {source.lines[index] + 1}"
        _, annotations = found.setdefault(image, (place, []))
        annotations += [
            _annotation(item, sizes[image], place) for item in objects
        ]
    pictures = [
        Picture(
            relative_path(image, source.image_folder),
            annotations,
            sizes[image],
            place,
        )
        for image, (place, annotations) in found.items()
    ]
    return ObjectSet(
        path, source.image_folder, tuple(classes), pictures, +skipped
    )


def write(
    objects: ObjectSet,
    path: Path,
    image_folder: str,
    task: str = "detect",
    codec: MaskCodec | None = None,
) -> Counter:
    """Write a set of objects as JSONL, for `fit` and `--data`.

    Args:
        objects: `ObjectSet` of pictures in pixels, without problems.
        path: path of the file to write.
        image_folder: str, folder that names of pictures become relative to.
        task: "detect", or "segment", which requires a mask of every object.
        codec: `MaskCodec` that encodes masks; the embedded one if `None`.

    Returns:
        Counter of what the format cannot hold, such as objects with a ";" in
        their label, or without a mask if the task is "segment".

    Raises:
        ValueError: if the task is unknown.
        ImportError: if pycocotools is not installed, and the task is
            "segment".
    """
    lost = Counter()
    source = ObjectSource(
        objects, task, encode_mask=codec and codec.encode_mask
    )
    with path.open("w", encoding="utf-8") as file:
        for index in range(len(source)):
            picture = source.picture(index)
            try:
                example = source[index]
            except ExampleError as error:
                lost["pictures with objects that cannot be written"] += 1
                if error.remainder is None:
                    continue
                example = error.remainder
            name = relative_name(picture, objects, image_folder)
            line = {"image": name, "prefix": example["prompts"]}
            line["suffix"] = example["responses"]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            lost["fields of other formats"] += has_fields(picture.extra)
            for annotation in picture.annotations:
                lost["edges rounded to 1/1023 of the side"] += 1
                kind = "masks as 16 codes" if task == "segment" else "masks"
                lost[kind] += annotation.has_mask()
                lost["scores"] += annotation.score is not None
                lost["marks of crowds"] += annotation.is_crowd
                lost["fields of other formats"] += has_fields(annotation.extra)
    lost.update(source.left_out)
    lost["boxes clipped"] += source.clipped
    used = {
        annotation.label
        for picture in objects.pictures
        for annotation in picture.annotations
    }
    lost["classes without an object"] += len(set(objects.classes) - used)
    return +lost


def _annotation(item, size, place):
    x1, y1, x2, y2 = item.xyxy(size)
    mask = None if item.mask is None else to_rle(item.mask_in(size))
    return Annotation(item.label, (y1, x1, y2, x2), mask, place=place)
