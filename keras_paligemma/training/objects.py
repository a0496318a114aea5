"""Mean average precision during training of a detector."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras

from keras_paligemma.metrics import mean_average_precision


class EvaluateObjects(keras.callbacks.Callback):
    """Compute mean average precision on some pictures after each epoch.

    To the loss, a box that is one pixel off is as wrong as a box on the other
    side of the picture; to average precision it is not. The values are added
    to the epoch's logs as "val_map", "val_map_50" and "val_map_75", for the
    callbacks after this one, such as `CSVLogger` or `EarlyStopping`.

    Args:
        images: list of pictures, as `generate` takes them.
        objects: list per picture of (box, label), or of objects with these
            attributes; a box is (y1, x1, y2, x2), relative to the picture.
        labels: list of str, labels to detect; those of `objects` if `None`.
        every: int, epochs between evaluations.
        batch_size: int, pictures at a time.
        detect: function of model, pictures and labels that returns a list of
            objects with scores per picture; the model's `detect` if `None`.

    Attributes:
        values: dict of epochs to dicts of `mean_average_precision`.

    Raises:
        ValueError: `images` and `objects` do not match or are empty, or
            `every` or `batch_size` is below 1.

    Example:

    ```python
    seen = EvaluateObjects(pictures, [[((0.1, 0.2, 0.5, 0.6), "cat")], …])
    model.fit(batches, epochs=3, callbacks=[seen])
    seen.values[3]["map"]
    ```
    """

    def __init__(
        self,
        images: Sequence[Any],
        objects: Sequence[Sequence[Any]],
        labels: Sequence[str] | None = None,
        every: int = 1,
        batch_size: int = 8,
        detect: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        if len(images) != len(objects) or not len(images):
            raise ValueError(
                "Pictures and their objects go together. Expected: equally "
                f"long lists, of one or more. Received: {len(images)} "
                f"pictures, {len(objects)} lists of objects."
            )
        if every < 1 or batch_size < 1:
            raise ValueError(
                "`every` and `batch_size` are at least 1. Received: "
                f"every={every!r}, batch_size={batch_size!r}."
            )
        named = {
            found.label if hasattr(found, "label") else found[1]
            for some in objects
            for found in some
        }
        self.images, self.objects = images, objects
        self.labels = sorted(named) if labels is None else list(labels)
        self.every, self.batch_size = every, batch_size
        self.detect = detect or _own
        self.values = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if (epoch + 1) % self.every:
            return
        found = []
        for first in range(0, len(self.images), self.batch_size):
            some = self.images[first : first + self.batch_size]
            found += self.detect(self.model, some, self.labels)
        values = mean_average_precision(found, self.objects)
        self.values[epoch + 1] = values
        shown = {f"val_{n}": values[n] for n in ("map", "map_50", "map_75")}
        if logs is not None:
            logs.update(shown)
        print(
            "".join(f"  {name}: {value:.4f}" for name, value in shown.items())
        )


def _own(model, images, labels):
    return model.detect(images, labels)
