"""Metrics of this room as Keras metrics, fed batch by batch."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_paligemma.metrics.scores import Scores


class Streamed(keras.metrics.Metric):
    """Any metric here whose rows do not depend on each other.

    It keeps the sum and the count of each column, so a data set of any size
    takes the same memory, and the result is that of all rows at once. CIDEr
    weighs n-grams by all references and mean average precision sorts all
    boxes: they need their function and the whole lists.

    Texts are compared on the host, so `update_state` is called between steps,
    such as from a callback, and not within a compiled one.

    Args:
        function: metric of this room, such as `vqav2`.
        name: str; the function's name if `None`.
        **kwargs: arguments of the function that are no columns: `lower=True`.

    Example:

    ```python
    metric = Streamed(vqav2)
    metric.update_state(["cat"], [["cat"] * 10])
    metric.result()  # {"acc": 1.0}
    ```
    """

    def __init__(
        self,
        function: Callable[..., Scores],
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name or function.__name__)
        if function.__name__ in ("cider", "captions"):
            raise ValueError(
                f"{function.__name__} weighs n-grams by how many rows have "
                "them, so it cannot stream. Collect predictions and references "
                "and call the function, or stream `bleu` or `rouge`."
            )
        self.function = function
        self.arguments = kwargs
        self.reset_state()

    def update_state(
        self, predictions: Sequence[str], *columns: Any, **named: Any
    ) -> None:
        """Add rows; takes what the function takes, without its options."""
        scores = self.function(predictions, *columns, **named, **self.arguments)
        for name, values in scores.columns.items():
            total, count = self._sums.get(name, (0.0, 0))
            counted = values[~np.isnan(values)]
            # One after another, as of all rows at once.
            for gram in counted.tolist():
                total += gram
            self._sums[name] = (total, count + len(counted))
        self._combine = scores.combine or self._combine

    def result(self) -> dict[str, float]:
        """Return the values of all rows so far; an empty dict of none."""
        means = {
            name: np.asarray(total / count if count else np.nan)
            for name, (total, count) in self._sums.items()
        }
        if not means:
            return {}
        rows = max(count for _, count in self._sums.values())
        combined = self._combine(means, rows) if self._combine else means
        return {name: float(value) for name, value in combined.items()}

    def reset_state(self) -> None:
        """Forget all rows."""
        self._sums, self._combine = {}, None
