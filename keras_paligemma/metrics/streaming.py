"""The metrics as Keras metrics, updated batch by batch."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_paligemma.metrics.scores import Scores


class Streamed(keras.metrics.Metric):
    """A Keras metric of any function here whose rows are independent.

    It keeps the sum and count of each column, so memory does not grow with the
    data, and the result is that of all rows at once. CIDEr, which weights
    n-grams by all references, and mean average precision, which sorts all
    boxes, have to be called on the whole lists.

    Text is compared on the host, so call `update_state` between steps, such as
    in a callback, and not in a compiled step.

    Args:
        function: metric of `keras_paligemma.metrics`, such as `vqav2`.
        name: str; the function's name if `None`.
        **kwargs: options of the function, such as `lower=True`.

    Raises:
        ValueError: the function's value is no mean of rows: `cider`,
            `captions` or `mean_average_precision`.

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
        if function.__name__ == "mean_average_precision":
            raise ValueError(
                "mean_average_precision orders the objects of all pictures, so "
                "it cannot stream. Collect predictions and truth and call the "
                "function, or stream `box_f1`."
            )
        self.function = function
        self.arguments = kwargs
        self.reset_state()

    def update_state(
        self, predictions: Sequence[str], *columns: Any, **named: Any
    ) -> None:
        """Add rows, passed as to the function, without its options."""
        scores = self.function(predictions, *columns, **named, **self.arguments)
        for name, values in scores.columns.items():
            total, count = self._sums.get(name, (0.0, 0))
            counted = values[~np.isnan(values)]
            # Summed one by one, as in `Scores.values`.
            for value in counted.tolist():
                total += value
            self._sums[name] = (total, count + len(counted))
        self._combine = scores.combine

    def result(self) -> dict[str, float]:
        """Return the values over all rows so far; `{}` before any rows."""
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
        """Clear all rows."""
        self._sums, self._combine = {}, None
