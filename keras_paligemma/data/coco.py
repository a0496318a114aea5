"""A COCO file as `detect` and `segment` examples."""

import os
from pathlib import Path
from typing import Any

from keras_paligemma.data import coco_file
from keras_paligemma.data.object_source import ObjectSource


class COCOSource(ObjectSource):
    """Examples of a COCO file: a picture, its classes, their boxes or masks.

    The JSON is read as a whole; pictures are not read here. Prompts, answers,
    crowds and boxes outside their picture are handled as in `ObjectSource`.

    Args:
        path: str or path of the JSON file.
        image_folder: str or path that `file_name` is relative to.
        task: "detect" or "segment".
        **options: as `ObjectSource` takes them: `classes`, `keep_empty`,
            `encode_mask`, `keep_crowds`, `outside`.

    Raises:
        ValueError: if the file is not a COCO file, annotations name missing
            pictures or categories, or arguments do not fit together.
        ExampleError: on `source[index]`, see `ObjectSource`.

    Example:

    ```python
    source = COCOSource("instances_train2017.json", "train2017")
    source[0]["prompts"]  # "detect person ; bicycle"
    ```

    Source: https://cocodataset.org/#format-data.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str],
        task: str = "detect",
        **options: Any,
    ) -> None:
        data = coco_file.read(Path(path), os.fspath(image_folder))
        super().__init__(data, task, **options)
