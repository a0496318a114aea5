"""Read a batch by its number: select its examples, preprocess and stack."""

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

# From this number on, Grain's shuffle, which needs no memory, takes about 10 µs
# per index. For fewer examples it searches 65,536 indices, up to 10 ms.
_FEW = 10_000


class Problem(NamedTuple):
    """An invalid example.

    Args:
        index: int, its number.
        message: str, the problem and its place.
        used: bool, whether the example without its invalid objects is in the
            batch.
    """

    index: int
    message: str
    used: bool


@dataclasses.dataclass
class Reader:
    """A function from a batch's number to the batch; runs in worker processes.

    Args:
        source, preprocessor, batch_size, shuffle, seed, shard, skip_errors:
            as `Batches` takes them.
        steps: int, batches per epoch.
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
        """Return a batch and the list of its `Problem`s."""
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
        """Return the numbers of the examples, in the order of an epoch."""
        if not self.shuffle:
            return range(len(self.source))
        return _shuffled(len(self.source), self.seed, epoch)

    def _row(self, index, epoch):
        """Return an example's arrays or `None`, and its `Problem` or `None`."""
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
        """Return an example's arrays, and what was left out or `None`."""
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
        """Return zeros shaped as the first valid example, and its place."""
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
        """Raise if the shapes differ from those of the first valid example."""
        blank, place = self._blank
        wanted, found = _shapes(blank), _shapes(arrays)
        for key in wanted | found:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"The example fits no batch with {place}: its '{key}' has "
                    f"shape {found.get(key)}, and that one's "
                    f"{wanted.get(key)}. {SAME_FRAMES}"
                )


def _shapes(arrays):
    """Return the shapes of `(x, y, sample_weight)` by name."""
    x, y, weights = arrays
    named = {**x, "targets": y, "weights": weights}
    return {key: np.shape(value) for key, value in named.items()}


@functools.lru_cache(maxsize=2)
def _shuffled(count, seed, epoch):
    """Return the numbers below `count`, in the shuffled order of an epoch."""
    # NumPy guarantees that the numbers of `RandomState` never change.
    if count < _FEW:
        return np.random.RandomState([seed, epoch]).permutation(count)
    # Otherwise epoch 1 of seed 0 would have the order of epoch 0 of seed 1.
    seed = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
    return grain_or_error().MapDataset.range(count).shuffle(seed=int(seed))


def _stack(examples):
    """Stack examples to a batch."""
    xs, ys, weights = zip(*examples, strict=True)
    x = {key: np.stack([inputs[key] for inputs in xs]) for key in xs[0]}
    return x, np.stack(ys), np.stack(weights)


def grain_or_error():
    """Return Grain; the error says how to install it."""
    try:
        import grain
    except ImportError as error:
        raise ValueError(
            "Batches are read by Grain. Install it with "
            "`pip install 'keras_paligemma[data]'`."
        ) from error
    return grain
