"""Text spotting: precision, recall and F1 of words in polygons."""

from collections.abc import Sequence
from typing import Any

from keras_paligemma.metrics.detection import quotients
from keras_paligemma.metrics.needs import needed
from keras_paligemma.metrics.scores import Scores
from keras_paligemma.metrics.scores import check_rows
from keras_paligemma.metrics.scores import check_texts
from keras_paligemma.metrics.scores import column
from keras_paligemma.tasks.answers import read_objects

# ICDAR's and Total-Text's marks of illegible words.
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

    A box matches a word if the intersection over union of box and polygon
    exceeds the threshold and, with `match_text`, the texts are equal. Words
    and boxes are matched at most once, in the order of the words. Illegible
    words, "###", are ignored, and so are boxes of which such words cover more
    than half.

    Args:
        predictions: list of str, "<loc…>×4 word ; …".
        polygons: list per picture of polygons [(x, y), …] in pixels.
        texts: list per picture of the polygons' words.
        sizes: list of (height, width) in pixels.
        match_text: bool; `False` compares only the places.
        threshold: float, intersection over union.

    Returns:
        `Scores` of "precision", "recall" and "f1" over all pictures.

    Raises:
        ValueError: polygons and texts do not match, a polygon has fewer than
            three corners, or shapely is not installed.

    Source: https://arxiv.org/abs/1506.03000, task 4.1, for the matching.
    """
    shapely = needed("shapely", "Overlap of polygons")
    check_rows(predictions, polygons=polygons, texts=texts, sizes=sizes)
    check_texts("texts", texts, several=True)
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
            (_polygon(shapely, corners, row), word)
            for corners, word in zip(polygons[row], texts[row], strict=True)
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
    # Some annotated polygons intersect themselves.
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
