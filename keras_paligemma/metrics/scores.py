"""The result of a metric: values per row, their means, and intervals."""

import dataclasses
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

# Bootstrap draws at a time: 16 of 100,000 rows take 13 MB.
_DRAWS = 16


@dataclasses.dataclass(frozen=True)
class Scores:
    """Values per row, and how a metric is computed from their means.

    Every metric here is a function of means over rows: an accuracy is one
    mean, an error rate a quotient of two, BLEU a product of several. So the
    same columns give the metric, its bootstrap interval and the worst rows,
    and columns of several hosts can be concatenated.

    Args:
        columns: dict of names to float64 arrays (rows,); nan in rows that do
            not count, such as a question of another type.
        combine: function of a dict of means, arrays of equal shape, and the
            number of rows, that returns a dict of values; `None` if the means
            are the values. It never sees single rows, so it also works on
            running sums.
        quality: float64 array (rows,) by which rows are sorted, higher is
            better; the first column if `None`.

    Example:

    >>> scores = Scores({"acc": np.array([1.0, 0.0, 1.0, 1.0])})
    >>> scores.values()
    {'acc': 0.75}
    """

    columns: Mapping[str, np.ndarray]
    combine: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    quality: np.ndarray | None = None

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def values(self) -> dict[str, float]:
        """Compute the metric's values over all rows.

        Returns:
            dict of names to floats; nan if no row counts.
        """
        means = {}
        for name, column in self.columns.items():
            counted = column[~np.isnan(column)]
            # Summed in order, as the original sums its lists.
            total = float(np.add.accumulate(counted)[-1]) if len(counted) else 0
            means[name] = np.divide(
                total,
                len(counted),
                out=np.array(np.nan),
                where=len(counted) > 0,
            )
        return {
            name: float(value) for name, value in self._combined(means).items()
        }

    def counts(self) -> dict[str, int]:
        """Return the number of rows that count in each column."""
        return {
            name: int((~np.isnan(column)).sum())
            for name, column in self.columns.items()
        }

    def intervals(
        self, level: float = 0.95, draws: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Compute percentile bootstrap intervals of the values.

        Rows are drawn with replacement, as many as there are, and the values
        computed for each draw. Anything that is not a mean over rows, such as
        CIDEr's document frequencies, stays fixed.

        Args:
            level: float, confidence level, 0 to 1.
            draws: int, number of draws.
            seed: int, seed of the draws.

        Returns:
            dict of names to (low, high).
        """
        rows = len(self)
        table = np.stack([*self.columns.values()]).astype("float64")
        counted = ~np.isnan(table)
        table = np.where(counted, table, 0.0)
        counted = counted.astype("float64")
        random = np.random.default_rng(seed)
        parts = []
        for first in range(0, draws, _DRAWS):
            size = min(_DRAWS, draws - first)
            weights = np.stack(
                [
                    np.bincount(
                        random.integers(rows, size=rows), minlength=rows
                    )
                    for _ in range(size)
                ]
            ).T.astype("float64")
            with np.errstate(invalid="ignore"):
                parts.append((table @ weights) / (counted @ weights))
        means = dict(zip(self.columns, np.concatenate(parts, 1), strict=True))
        tail = 50 * (1 - level)
        found = {}
        for name, drawn in self._combined(means).items():
            drawn = drawn[~np.isnan(drawn)]
            low, high = (
                np.percentile(drawn, [tail, 100 - tail]).tolist()
                if len(drawn)
                else (np.nan, np.nan)
            )
            found[name] = (low, high)
        return found

    def worst(self, count: int) -> list[int]:
        """Return the rows of lowest quality, the worst first.

        Args:
            count: int, largest number of rows.

        Returns:
            list of int, row indices; ties are in row order.
        """
        quality = self.quality
        if quality is None:
            quality = next(iter(self.columns.values()))
        order = np.argsort(quality, kind="stable")
        return [int(row) for row in order[:count] if not np.isnan(quality[row])]

    def _combined(self, means):
        return means if self.combine is None else self.combine(means, len(self))


def column(values: Sequence[float]) -> np.ndarray:
    """Convert numbers, one per row, to a float64 column."""
    return np.array(values, "float64")


def by_kind(
    name: str,
    values: np.ndarray,
    kinds: Sequence[Any] | np.ndarray,
    names: Mapping[Any, str],
) -> dict[str, np.ndarray]:
    """Split a column by the kind of its rows.

    Args:
        name: str, such as "acc".
        values: float64 array (rows,).
        kinds: sequence, the kind of each row.
        names: dict of kinds to suffixes of the name.

    Returns:
        dict of "acc/yesno" and so on to columns, for the kinds that occur.

    Example:

    >>> by_kind("acc", np.ones(2), ["a", "b"], {"a": "first"})
    {'acc/first': array([ 1., nan])}
    """
    kinds = np.array(kinds, dtype=object)
    is_kind = {shown: kinds == kind for kind, shown in names.items()}
    return {
        f"{name}/{shown}": np.where(rows, values, np.nan)
        for shown, rows in is_kind.items()
        if rows.any()
    }


def check_kinds(
    what: str, kinds: Sequence[Any] | np.ndarray, known: Sequence[Any]
) -> None:
    """Check the kinds of rows.

    Args:
        what: str, what the kinds are of, for the message.
        kinds: sequence, the kind of each row.
        known: sequence of the kinds that there are.

    Raises:
        ValueError: a kind is unknown.
    """
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise ValueError(
            f"Unknown {what}. Expected: {list(known)}. Received: {unknown[:5]}."
        )


def check_texts(
    name: str, values: Sequence[Any], several: bool = False
) -> None:
    """Check that the rows of a column of references are text.

    Args:
        name: str, name of the column.
        values: sequence, one entry per row.
        several: bool, whether an entry may also be a list of texts.

    Raises:
        ValueError: an entry is something else.
    """
    for row, value in enumerate(values):
        if isinstance(value, str):
            continue
        listed = several and isinstance(value, Collection)
        if not listed or not all(isinstance(part, str) for part in value):
            raise ValueError(
                f"Row {row} of {name!r} is no text. Expected: a string"
                f"{' or a list of strings' if several else ''}. Received: "
                f"{value!r:.80}."
            )


def check_rows(
    predictions: Sequence[str], **others: Sequence[Any] | None
) -> None:
    """Check that all columns have the same length, which is not 0.

    Raises:
        ValueError: there is no row, a column is of another length, or a
            prediction is no string.
    """
    lengths = {"predictions": len(predictions)}
    lengths |= {
        k: len(values) for k, values in others.items() if values is not None
    }
    if len(set(lengths.values())) != 1 or not len(predictions):
        raise ValueError(
            "A metric compares one or more rows. Expected: columns of one "
            f"length. Received lengths: {lengths}."
        )
    for row, text in enumerate(predictions):
        if not isinstance(text, str):
            raise ValueError(
                f"The prediction of row {row} is no text. Expected: a string. "
                f"Received: {text!r:.80}."
            )
