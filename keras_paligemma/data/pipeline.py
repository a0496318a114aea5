"""Batches of examples: order, worker processes, shards and state."""

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from keras_paligemma.data.examples import ExampleError
from keras_paligemma.data.reader import Reader
from keras_paligemma.data.reader import grain_or_error
from keras_paligemma.preprocessing.inputs import to_integer

# The number of batches without `epochs`; larger numbers do not fit into `len`.
_ENDLESS = 2**62
# Messages stored in `problems`; all are counted.
_MOST_PROBLEMS = 1000


class Batches:
    """Preprocessed batches of a source, each determined by its number.

    Number, seed and source determine a batch. The order is therefore the same
    with any number of worker processes. One integer is enough to resume a run
    at the exact example, even with another number of workers. The order, and
    the answers drawn from several, change with each epoch. Grain reads batches
    ahead, in a thread or in processes.

    An invalid example raises an error with file and line. With
    `skip_errors=True` it is counted and its row is blank: zeros with weight 0,
    which the model's loss excludes from its mean. Shapes and all other
    examples keep their places, and hosts stay in step. The rows that fill up
    the last batch with `drop_remainder=False` are blank, too. If only some
    objects of an example are invalid, it is used without them.

    Args:
        source: object with a length whose `[index]` returns an example; see
            `keras_paligemma.data`.
        preprocessor: `PaliGemmaCausalLMPreprocessor`, or any function from one
            example to `(x, y, sample_weight)`, with `x` a dict of arrays.
        batch_size: int, examples per batch on this host.
        shuffle: bool, whether to shuffle the order in each epoch.
        seed: int of 0 to 2³² - 1, for the order and the drawn answers.
        epochs: int, passes over the data; endless if `None`.
        workers: int, number of processes; 0 reads in a thread. Processes are
            spawned: a script needs `if __name__ == "__main__":`, and each
            takes as long to start as an import of KerasHub.
        skip_errors: bool, whether to count invalid examples and continue.
        drop_remainder: bool, whether to leave out the examples that do not
            fill a batch; otherwise blank rows fill it up.
        shard: `(index, count)` of this host, as `sharding.data_shard()`
            returns it. Within an epoch, no example is on two hosts,
            and all have the same number of batches. Together they are the
            batches of a single host with the total batch size.

    Raises:
        ValueError: if there are no examples, fewer than a batch, or an
            argument is out of range; while iterating, if no example is valid.
        ExampleError: while iterating, without `skip_errors`.

    Attributes:
        skipped: int, examples skipped since this object was created, counted
            in each epoch. They count when their batch is returned, not when a
            worker reads it (`fit` on TensorFlow requests batches early). The
            1st, 10th, 100th … raise a warning.
        incomplete: int, examples used without their invalid objects, counted
            and reported in the same way.
        problems: dict of example number to message, for the first 1000.

    Example:

    ```python
    batches = Batches(JSONLSource("train.jsonl"), model.preprocessor, 8)
    model.fit(batches, epochs=2)  # len(batches) steps an epoch
    state = batches.get_state(len(batches) * 2)  # after this many batches
    batches.set_state(state)  # the next `fit` continues there
    ```
    """

    def __init__(
        self,
        source: Any,
        preprocessor: Callable[..., Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        workers: int = 0,
        skip_errors: bool = False,
        drop_remainder: bool = True,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        batch_size = to_integer(batch_size, "batch_size")
        # What NumPy takes.
        seed = to_integer(seed, "seed", 0, 2**32 - 1)
        workers = to_integer(workers, "workers", 0)
        if epochs is not None:
            epochs = to_integer(epochs, "epochs")
        index, count = shard
        count = to_integer(count, "shard[1]")
        if not 0 <= index < count:
            raise ValueError(
                "`shard` must be (index, count) with 0 <= index < count. "
                f"Received: {shard}."
            )
        if not len(source):
            raise ValueError(
                "The data set is empty. Expected: at least one example. "
                f"Received: {type(source).__name__} of length 0."
            )
        grain_or_error()
        together = batch_size * count
        steps, rest = divmod(len(source), together)
        if rest and not drop_remainder:
            steps += 1
        if not steps:
            raise ValueError(
                "There are too few examples for a batch. Expected: at least "
                f"{together} ({batch_size} a batch, {count} hosts). Received: "
                f"{len(source)}. Lower `batch_size`, or pass "
                "`drop_remainder=False`."
            )
        self._reader = Reader(
            source,
            preprocessor,
            batch_size,
            steps,
            shuffle,
            seed,
            (index, count),
            skip_errors,
        )
        self.batch_size = batch_size
        self.epochs = epochs
        self.workers = workers
        self.skip_errors = skip_errors
        self.skipped = 0
        self.incomplete = 0
        self.problems = {}
        self._first = 0
        # A position refers to batches with these properties.
        self._identity = {
            "examples": len(source),
            "examples_a_step": together,
            "steps_an_epoch": steps,
            "shuffle": bool(shuffle),
            "seed": seed,
        }

    def __len__(self):
        """Return the number of batches per epoch."""
        return self._reader.steps

    @property
    def total(self) -> int | None:
        """The number of batches left to an iterator; `None` if endless."""
        if self.epochs is None:
            return None
        return max(self.epochs * len(self) - self._first, 0)

    def __iter__(self) -> "BatchIterator":
        """Start at the state that was set, or at the first batch."""
        return BatchIterator(self, self._first)

    def get_state(self, consumed: int = 0) -> dict[str, Any]:
        """Return the state after a number of batches.

        It does not depend on an iterator, which may have read ahead.

        Args:
            consumed: int, batches that training has used since the iteration
                started, such as the steps of `fit`.

        Returns:
            dict, ready for JSON, the same on all hosts.
        """
        return {"batches": self._first + int(consumed), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Start new iterators at a state.

        Args:
            state: dict returned by `get_state` of this object or of its
                iterators.

        Raises:
            ValueError: if data, order or the number of examples per step
                differ. Numbers of workers and hosts may differ.
        """
        self._first = self._position(state)

    def _position(self, state):
        received = {key: state.get(key) for key in self._identity}
        if received != self._identity or "batches" not in state:
            raise ValueError(
                "The state belongs to other batches. Expected: "
                f"{self._identity}. Received: {state}."
            )
        return state["batches"]

    def _read_ahead(self, first) -> Any:
        """Return an iterator over the reader's batches, from a number on."""
        grain = grain_or_error()
        from absl import flags  # A dependency of Grain.

        stop = _ENDLESS if self.epochs is None else self.epochs * len(self)
        if first >= stop:
            return iter(())
        dataset = grain.MapDataset.range(first, stop).map(self._reader)
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads flags, which only absl programs parse.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=2
                ),
                worker_init_fn=_start_worker,
            )
        return iter(dataset)

    def _count(self, problems):
        """Raise or count the problems of a batch."""
        if problems and not self.skip_errors:
            raise ExampleError(
                f"{problems[0].message} (Mend or remove the example, or pass "
                "`skip_errors=True` (of the command: `--skip-errors`) "
                "to count such examples and go on; `check` lists all of them.)"
            )
        for index, message, used in problems:
            if used:
                self.incomplete += 1
                count, fate = self.incomplete, "used in part"
            else:
                self.skipped += 1
                count, fate = self.skipped, "skipped"
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems[index] = message
            if str(count).rstrip("0") == "1":
                warnings.warn(
                    f"Examples {fate} so far: {count}. The last: {message}",
                    stacklevel=3,
                )


class BatchIterator:
    """Iterator over batches; its state is the number of the next batch.

    Args:
        batches: `Batches`.
        position: int, number of the first batch.
    """

    def __init__(self, batches: Batches, position: int):
        self._batches = batches
        self._position = position
        self._ahead: Any = None

    def __iter__(self):
        return self

    def __next__(self):
        if self._ahead is None:
            self._ahead = self._batches._read_ahead(self._position)
        try:
            batch, problems = next(self._ahead)
            self._batches._count(problems)
        except StopIteration:
            raise
        except BaseException:
            # The batches read ahead follow the one that failed.
            self.close()
            raise
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the state after the batches returned so far."""
        batches = self._batches
        return batches.get_state(self._position - batches._first)

    def set_state(self, state: dict[str, Any]):
        """Continue at a state, forwards or backwards."""
        position = self._batches._position(state)
        if position != self._position:
            self.close()
            self._position = position

    def close(self):
        """Stop worker processes; the next batch would start them again."""
        if hasattr(self._ahead, "close"):
            self._ahead.close()
        self._ahead = None


def _start_worker(worker, workers):
    """Stop a worker with its parent process, and hide accelerators from it."""
    threading.Thread(
        target=_end_with,
        args=[multiprocessing.parent_process()],
        daemon=True,
    ).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _end_with(parent):
    """Exit when the parent process has died.

    Grain stops its workers from the parent. A killed parent cannot do this.
    """
    parent.join()
    os._exit(1)
