"""The batch of a number: its examples, in their order, read and stacked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.examples import answers_of
from keras_paligemma.data.examples import located
from keras_paligemma.data.examples import where

# From here on Grain's shuffle, which holds no list, takes some 10 µs a number;
# below it looks for each among 65,536, up to 10 ms long.
_FEW = 10_000


@dataclasses.dataclass
class Reader:
    """Make the batch of a number; all that worker processes need.

    Args:
        source, preprocessor, batch_size, shuffle, seed, shard, skip_errors:
            as `Batches` takes them.
        steps: int, batches of an epoch.
        blank: arrays of a blank row, once one was needed.
    """

    source: Any
    preprocessor: Callable
    batch_size: int
    steps: int
    shuffle: bool
    seed: int
    shard: tuple[int, int]
    skip_errors: bool
    blank: tuple | None = None

    def __call__(self, number):
        """Return a batch, and the problems that its blank rows had."""
        epoch, step = divmod(int(number), self.steps)
        index, count = self.shard
        first = (step * count + index) * self.batch_size
        order = self._order(epoch)
        examples, problems = [], []
        for place in range(first, first + self.batch_size):
            example = None
            if place < len(self.source):
                try:
                    example = self._example(int(order[place]), epoch)
                except ExampleError as error:
                    problems.append((int(order[place]), str(error)))
            examples.append(example)
        if problems and not self.skip_errors:
            return None, problems
        return _stack([one or self._blank_row() for one in examples]), problems

    def _order(self, epoch):
        """Numbers of the examples, in the order of an epoch."""
        if not self.shuffle:
            return range(len(self.source))
        return _shuffled(len(self.source), self.seed, epoch)

    def _example(self, index, epoch):
        with located(where(self.source, index)):
            example = self.source[index]
            answers = answers_of(example)
            answer = answers[0]
            if len(answers) > 1:
                random = np.random.RandomState([self.seed, epoch, index])
                answer = answers[random.randint(len(answers))]
            arrays = self.preprocessor(
                {
                    "images": example["images"],
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

    def _blank_row(self):
        """Zeros in the shapes of an example; the first usable one tells."""
        if self.blank is None:
            problem = None
            for index in range(len(self.source)):
                try:
                    x, y, weights = self._example(index, 0)
                except ExampleError as error:
                    problem = problem or error
                    continue
                self.blank = (
                    {key: np.zeros_like(value) for key, value in x.items()},
                    np.zeros_like(y),
                    np.zeros_like(weights),
                )
                break
            else:
                raise ValueError(
                    f"None of the {len(self.source)} examples can be used. "
                    f"The first: {problem}"
                )
        return self.blank


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
