"""Words found in pictures: precision, recall and F1 on polygons."""

from collections.abc import Sequence
from typing import Any

from keras_paligemma.metrics.detection import quotients
from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import column
from keras_paligemma.tasks.answers import read_objects

# ICDAR's and Total-Text's mark of a word that nobody can read.
UNREADABLE = ("###", "#")


def text_detection(
    predictions: Sequence[str],
    polygons: Sequence[Sequence[Any]],
    texts: Sequence[Sequence[str]],
    sizes: Sequence[tuple[float, float]],
    match_text: bool = True,
    threshold: float = 0.5,
) -> Scores:
    """Score answers that list words with their boxes.

    A word is met where a box overlaps its polygon by more than the threshold,
    intersection over union, and, on request, the text is the same letter for
    letter. Each word and each box is met once, in the order of the file. Words
    that nobody can read, "###", count for nothing: neither do boxes of which
    such a word covers more than half.

    Args:
        predictions: strings, "<loc…>×4 word ; …".
        polygons: of each picture a list of [(x, y), …] in pixels.
        texts: of each picture the words of its polygons.
        sizes: of each picture (height, width) in pixels.
        match_text: bool; `False` compares places alone.
        threshold: float.

    Returns:
        `Scores` of "precision", "recall" and "f1" over all pictures.

    Raises:
        ValueError: polygons and texts do not match, or a polygon has fewer
            than three corners.

    Source: https://arxiv.org/abs/1506.03000, task 4.1, for the matching.
    """
    shapely = needed("shapely", "Overlap of polygons")
    check_rows(predictions, polygons=polygons, texts=texts, sizes=sizes)
    met, predicted, wanted = [], [], []
    for row, text in enumerate(predictions):
        found = [
            (shapely.box(*word.xyxy(sizes[row])), word.label)
            for word in read_objects(text)
        ]
        if len(polygons[row]) != len(texts[row]):
            raise ValueError(
                f"Row {row} has {len(polygons[row])} polygons and "
                f"{len(texts[row])} texts. Expected: as many of both."
            )
        words = [
            (_polygon(shapely, one, row), word)
            for one, word in zip(polygons[row], texts[row], strict=True)
        ]
        hidden = [shape for shape, word in words if word in UNREADABLE]
        words = [word for word in words if word[1] not in UNREADABLE]
        found = [word for word in found if not _covered(word[0], hidden)]
        met.append(_pairs(found, words, match_text, threshold))
        predicted.append(len(found))
        wanted.append(len(words))
    return quotients(column(met), column(predicted), column(wanted))


def _polygon(shapely, corners, row):
    if len(corners) < 3:
        raise ValueError(
            f"Row {row}: a polygon has three or more corners. Received: "
            f"{corners!r:.80}."
        )
    # Annotators cross their own lines now and then.
    return shapely.make_valid(shapely.Polygon(corners))


def _covered(box, shapes):
    return any(
        box.area and box.intersection(shape).area / box.area > 0.5
        for shape in shapes
    )


def _pairs(found, words, match_text, threshold):
    left, met = list(found), 0
    for shape, word in words:
        for place, (box, text) in enumerate(left):
            if match_text and text != word:
                continue
            union = shape.union(box).area
            if union and shape.intersection(box).area / union > threshold:
                del left[place]
                met += 1
                break
    return met
