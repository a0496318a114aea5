"""The batch of a number: its examples, in their order, read and stacked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_paligemma.data.examples import SAME_FRAMES
from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import answers_of
from keras_paligemma.data.examples import frames_of
from keras_paligemma.data.examples import located
from keras_paligemma.data.examples import where

# From here on Grain's shuffle, which holds no list, takes some 10 µs a number;
# below it looks for each among 65,536, up to 10 ms long.
_FEW = 10_000


class Problem(NamedTuple):
    """What was wrong with an example, and what became of it.

    Args:
        index: int, its number.
        message: str, with its place.
        used: bool, whether its remainder is in the batch.
    """

    index: int
    message: str
    used: bool


@dataclasses.dataclass
class Reader:
    """Make the batch of a number; all that worker processes need.

    Args:
        source, preprocessor, batch_size, shuffle, seed, shard, skip_errors:
            as `Batches` takes them.
        steps: int, batches of an epoch.
    """

    source: Any
    preprocessor: Callable
    batch_size: int
    steps: int
    shuffle: bool
    seed: int
    shard: tuple[int, int]
    skip_errors: bool

    def __call__(self, number):
        """Return a batch, and the problems that its examples had."""
        epoch, step = divmod(int(number), self.steps)
        index, count = self.shard
        first = (step * count + index) * self.batch_size
        order = self._order(epoch)
        rows, problems = [], []
        for place in range(first, first + self.batch_size):
            row = None
            if place < len(self.source):
                row, problem = self._row(int(order[place]), epoch)
                problems.extend([] if problem is None else [problem])
            rows.append(row)
        if problems and not self.skip_errors:
            return None, problems
        return _stack([row or self._blank[0] for row in rows]), problems

    def _order(self, epoch):
        """Numbers of the examples, in the order of an epoch."""
        if not self.shuffle:
            return range(len(self.source))
        return _shuffled(len(self.source), self.seed, epoch)

    def _row(self, index, epoch):
        """Arrays of an example or `None`, and its `Problem` or `None`."""
        try:
            arrays, left_out = self._read(index, epoch)
            with located(where(self.source, index)):
                self._check_shapes(arrays)
        except ExampleError as error:
            return None, Problem(index, str(error), False)
        if left_out is None:
            return arrays, None
        return arrays, Problem(index, left_out, True)

    def _read(self, index, epoch):
        """Arrays of an example; the message of what was left out, or `None`."""
        with located(where(self.source, index)):
            left_out = None
            try:
                example = self.source[index]
            except ExampleError as error:
                if error.remainder is None or not self.skip_errors:
                    raise
                example, left_out = error.remainder, str(error)
            return self._arrays(example, index, epoch), left_out

    def _arrays(self, example, index, epoch):
        answers = answers_of(example)
        answer = answers[0]
        if len(answers) > 1:
            random = np.random.RandomState([self.seed, epoch, index])
            answer = answers[random.randint(len(answers))]
        frames = frames_of(example["images"])
        arrays = self.preprocessor(
            {
                "images": frames if len(frames) > 1 else frames[0],
                "prompts": example["prompts"],
                "responses": answer,
            }
        )
        if not isinstance(arrays, tuple) or len(arrays) != 3:
            raise ValueError(
                "The preprocessor returned no training example. Expected: "
                f"(x, y, sample_weight). Received: {type(arrays).__name__}."
            )
        return arrays

    @functools.cached_property
    def _blank(self):
        """Zeros in the shapes of the first usable example, and its place."""
        problem = None
        for index in range(len(self.source)):
            try:
                (x, y, weights), _ = self._read(index, 0)
            except ExampleError as error:
                problem = problem or error
                continue
            zeros = {key: np.zeros_like(value) for key, value in x.items()}
            blank = (zeros, np.zeros_like(y), np.zeros_like(weights))
            return blank, where(self.source, index)
        raise ValueError(
            f"None of the {len(self.source)} examples can be used. "
            f"The first: {problem}"
        )

    def _check_shapes(self, arrays):
        """Refuse what the first usable example shares no batch with."""
        blank, place = self._blank
        for key, wanted in _shapes(blank).items():
            found = _shapes(arrays).get(key)
            if found != wanted:
                raise ValueError(
                    f"The example fits no batch with {place}: its '{key}' "
                    f"has shape {found}, and that one's {wanted}. {SAME_FRAMES}"
                )


def _shapes(arrays):
    """Shapes of `(x, y, sample_weight)` by name."""
    x, y, weights = arrays
    named = {**x, "targets": y, "weights": weights}
    return {key: np.shape(value) for key, value in named.items()}


@functools.lru_cache(maxsize=2)
def _shuffled(count, seed, epoch):
    """The numbers below `count` in an order of their own for each epoch."""
    # `RandomState`, whose numbers no version of NumPy changes.
    if count < _FEW:
        return np.random.RandomState([seed, epoch]).permutation(count)
    # Seeds that follow each other would share epochs without this.
    seed = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
    return grain_or_error().MapDataset.range(count).shuffle(seed=int(seed))


def _stack(examples):
    """Make one batch of examples."""
    xs, ys, weights = zip(*examples, strict=True)
    x = {key: np.stack([one[key] for one in xs]) for key in xs[0]}
    return x, np.stack(ys), np.stack(weights)


def grain_or_error():
    """Import Grain, or say how to get it."""
    try:
        import grain
    except ImportError as error:
        raise ValueError(
            "Batches are read by Grain. Install it with "
            "`pip install 'keras_paligemma[data]'`."
        ) from error
    return grain
