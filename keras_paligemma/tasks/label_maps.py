"""Convert masks from and to label maps: pictures of object numbers."""

from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from keras_paligemma.tasks.masks import check_mask


def from_label_map(
    picture: str | Path | Image.Image | np.ndarray,
    ignore: Iterable[int] | None = None,
) -> dict[int, np.ndarray]:
    """Read the masks of a label map.

    Args:
        picture: path, Pillow image or array: grey values or palette indices,
            8 or 16 bits; with three channels, red + 256 green + 65536 blue,
            as in COCO's panoptic maps.
        ignore: values that are not objects. `None` ignores the background, 0,
            and in maps of one channel VOC's border, 255.

    Returns:
        dict of value to bool array (height, width), sorted by value.

    Raises:
        ValueError: if the picture cannot be read, or is not a label map.

    Example:

    >>> found = from_label_map(np.array([[0, 7], [7, 255]], "uint8"))
    >>> {value: int(mask.sum()) for value, mask in found.items()}
    {7: 2}
    """
    values, is_panoptic = _values(picture)
    if ignore is None:
        ignore = (0,) if is_panoptic else (0, 255)
    ignored = set(ignore)
    found = [v for v in np.unique(values).tolist() if v not in ignored]
    return {value: values == value for value in found}


def to_label_map(masks: Mapping[int, np.ndarray]) -> Image.Image:
    """Write masks that do not overlap as one label map.

    Args:
        masks: dict of value, 1 to 65535, to bool array; all of one size. Avoid
            values that a reader ignores, such as 255 in VOC.

    Returns:
        `PIL.Image.Image` of 8 bits, or of 16 if a value needs them; pixels in
        no mask are 0.

    Raises:
        ValueError: if masks overlap or differ in size, or a value is out of
            range.

    Example:

    >>> to_label_map({7: np.ones((2, 3), bool)}).size
    (3, 2)
    """
    masks = {value: check_mask(mask) for value, mask in masks.items()}
    shapes = {mask.shape for mask in masks.values()}
    if len(shapes) != 1 or not all(0 < value < 65536 for value in masks):
        raise ValueError(
            "A map holds one mask or more, of one size, numbered 1 to 65535. "
            f"Received: sizes {sorted(shapes)}, numbers {list(masks)[:9]}."
        )
    values = np.zeros(shapes.pop(), "uint16")
    for value, mask in masks.items():
        if values[mask].any():
            raise ValueError(
                "A map cannot hold masks that overlap. Received: mask "
                f"{value} over mask {values[mask].max()}. Write run lengths, "
                "or cut one of them."
            )
        values[mask] = value
    small = max(masks) < 256
    return Image.fromarray(values.astype("uint8") if small else values)


def _values(picture):
    """Return the values of a map, (height, width), and whether from colours."""
    try:
        if isinstance(picture, (str, Path)):
            with Image.open(picture) as opened:
                values = np.asarray(opened)
        else:
            values = np.asarray(picture)
    except OSError as error:
        raise ValueError(f"The map cannot be read: {error}.") from error
    is_panoptic = values.ndim == 3 and values.shape[-1] == 3
    is_whole = np.issubdtype(values.dtype, np.integer)
    if not (is_whole and (values.ndim == 2 or is_panoptic)):
        raise ValueError(
            "This is no map of objects. Expected: a picture of one channel "
            "or three, of whole numbers. Received: "
            f"{values.dtype} {values.shape}."
        )
    if is_panoptic:
        values = values.astype("int64") @ (1, 256, 65536)
    return values, is_panoptic
