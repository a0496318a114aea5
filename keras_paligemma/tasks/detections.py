"""Convert the objects of a picture from and to `supervision.Detections`."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_paligemma.tasks.objects import Object

_NAME = "class_name"


def from_detections(
    detections: Any,
    size: tuple[int, int],
    classes: Sequence[str] | Mapping[int, str] | None = None,
) -> list[Object]:
    """Convert detections of supervision, or of any type with its attributes.

    Args:
        detections: `supervision.Detections`: `xyxy` in pixels; and `mask`,
            `confidence`, `class_id` and `data["class_name"]`, or `None` each.
        size: (height, width) of the picture, pixels.
        classes: names by `class_id`, used if there is no "class_name".

    Returns:
        list of `Object`, in the same order.

    Raises:
        ValueError: if a box is outside the picture, a class has no name, or a
            mask is empty within its box or not of the picture's size.

    Example:

    >>> import types
    >>> found = types.SimpleNamespace(
    ...     xyxy=np.array([[0, 0, 50, 40]]), mask=None, class_id=np.array([1]),
    ...     confidence=np.array([0.5]), data={},
    ... )
    >>> from_detections(found, (40, 100), ["cat", "dog"])
    [Object(box=(0.0, 0.0, 1.0, 0.5), label='dog', score=0.5)]
    """
    boxes = np.asarray(detections.xyxy, "float64").tolist()
    names = (getattr(detections, "data", None) or {}).get(_NAME)
    ids = detections.class_id
    if names is None and ids is not None:
        known = () if classes is None else classes
        known = known if isinstance(known, Mapping) else range(len(known))
        strange = {*ids.tolist()} - {*known} if classes is not None else ()
        if strange:
            raise ValueError(
                "Detections have classes without a name. Received: "
                f"{sorted(strange)}. Expected: of {list(known)}."
            )
        names = [
            str(id) if classes is None else classes[id] for id in ids.tolist()
        ]
    scores = detections.confidence
    objects = []
    for i, box in enumerate(boxes):
        item = Object.from_xyxy(
            box,
            size,
            label="" if names is None else str(names[i]),
            score=None if scores is None else float(scores[i]),
        )
        if detections.mask is not None:
            mask = np.asarray(detections.mask[i], bool)
            if mask.shape != tuple(size):
                raise ValueError(
                    "The masks are of another size than the picture. "
                    f"Expected: {tuple(size)}. Received: {mask.shape}."
                )
            item = item.with_mask(mask)
        objects.append(item)
    return objects


def to_detections(
    objects: Iterable[Object],
    size: tuple[int, int],
    classes: Sequence[str] | None = None,
) -> Any:
    """Convert objects to `supervision.Detections`, for its annotators.

    Masks and scores are included only if all objects have one, since
    supervision stores them for all objects or for none.

    Args:
        objects: `Object`s of one picture.
        size: (height, width) of the picture, pixels.
        classes: names whose indices are the `class_id`s; `None` uses the
            sorted labels of the objects.

    Returns:
        `supervision.Detections` with `data["class_name"]`.

    Raises:
        ImportError: if supervision is not installed.
        ValueError: if a label is not among the classes.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError(
            "Detections need supervision. Install it with `pip install "
            "supervision`."
        ) from error
    objects = list(objects)
    labels = [item.label for item in objects]
    classes = sorted(set(labels)) if classes is None else list(classes)
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise ValueError(
            f"Labels are not among the classes. Expected: {classes}. "
            f"Received: {unknown}."
        )
    if not objects:
        return supervision.Detections.empty()
    scores = [item.score for item in objects]
    masks = None
    if all(item.mask is not None for item in objects):
        masks = np.stack([item.mask_in(size) for item in objects])
    return supervision.Detections(
        xyxy=np.array([item.xyxy(size) for item in objects], "float32"),
        mask=masks,
        confidence=None if None in scores else np.array(scores, "float32"),
        class_id=np.array([classes.index(label) for label in labels]),
        data={_NAME: np.array(labels)},
    )
