"""Examples to batches: order, worker processes, shards, and where they are."""

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

# Far more batches than anybody trains on, and few enough for `len`.
_ENDLESS = 2**62
# Messages that are kept; all are counted.
_MOST_PROBLEMS = 1000


class Batches:
    """Preprocessed batches of a source, each a function of its number alone.

    Number, seed and source decide what is in a batch. So the order is the
    same with any number of worker processes, and a run resumes at the exact
    example, with other workers too, from one integer. Each epoch has an order
    and a draw of answers of its own. Batches are read ahead by Grain, in a
    thread or in processes.

    An example that cannot be used stops the iteration with an error that
    tells file and line. With `skip_errors=True` it is counted and its row is
    left blank: zeros of weight 0, which the model's loss leaves out of its
    mean. So shapes stay, no other example moves, and hosts stay in step. The
    rows that fill the last batch of `drop_remainder=False` are blank too. Where
    only some objects of an example are wrong and its source tells the others,
    these are trained on.

    Args:
        source: object of a length whose `[index]` gives an example; see
            `keras_paligemma.data`.
        preprocessor: `PaliGemmaCausalLMPreprocessor`, or any function of one
            example that returns `(x, y, sample_weight)`, `x` a dict of arrays.
        batch_size: int, examples a batch on this host.
        shuffle: bool, another order each epoch.
        seed: int, of the order and of the answers that are drawn.
        epochs: int, passes over the data; without end if `None`.
        workers: int, processes; 0 reads in a thread. They are spawned, so a
            script needs `if __name__ == "__main__":`, and each takes as long
            to start as importing KerasHub.
        skip_errors: bool, count examples that cannot be used and go on.
        drop_remainder: bool, whether the examples that fill no batch wait for
            another epoch; else the last batch is filled with blank rows.
        shard: `(index, count)` of this host, such as `(jax.process_index(),
            jax.process_count())`. Hosts have parts that share no example
            within an epoch, and equally many batches. The batches of all
            hosts together are those of one host with their whole batch size.

    Raises:
        ValueError: no examples, fewer than one batch, or an argument out of
            range; while iterating: no example at all can be used.
        ExampleError: while iterating, without `skip_errors`.

    Attributes:
        skipped: int, examples skipped since this object was made, counted
            once an epoch when their batch is handed out, not when a worker
            reads it (`fit` on TensorFlow asks for some batches ahead of what
            it uses). A warning tells of the 1st, the 10th, the 100th ….
        incomplete: int, examples used without the objects that were wrong,
            counted and told likewise.
        problems: dict of example number to message, of the first 1000.

    Example:

    ```python
    batches = Batches(JSONLSource("train.jsonl"), model.preprocessor, 8)
    model.fit(batches, epochs=2)  # len(batches) steps an epoch
    state = batches.get_state(len(batches) * 2)  # after as many batches
    batches.set_state(state)  # the next `fit` goes on from there
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
        _check_integer("batch_size", batch_size, 1)
        _check_integer("seed", seed, 0)
        _check_integer("workers", workers, 0)
        if epochs is not None:
            _check_integer("epochs", epochs, 1)
        index, count = shard
        _check_integer("shard[1]", count, 1)
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
        # What a position means nothing without.
        self._identity = {
            "examples": len(source),
            "examples_a_step": together,
            "steps_an_epoch": steps,
            "shuffle": bool(shuffle),
            "seed": seed,
        }

    def __len__(self):
        """Batches of one epoch."""
        return self._reader.steps

    @property
    def total(self) -> int | None:
        """Batches that an iterator has left to give; `None` without end."""
        if self.epochs is None:
            return None
        return max(self.epochs * len(self) - self._first, 0)

    def __iter__(self) -> "BatchIterator":
        """Begin where `set_state` said, or with the first batch."""
        return BatchIterator(self, self._first)

    def get_state(self, consumed: int = 0) -> dict[str, Any]:
        """Tell the state of an iterator of this object.

        It needs no iterator: whoever trains may have read further ahead.

        Args:
            consumed: int, batches that training has used since it began to
                iterate, as by steps of `fit`.

        Returns:
            dict that JSON can hold, equal on all hosts.
        """
        return {"batches": self._first + int(consumed), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Let iterators made from now on begin at a state.

        Args:
            state: dict of `get_state`, of this object or of its iterators.

        Raises:
            ValueError: it belongs to other data, another order or another
                number of examples a step. Workers and hosts may differ.
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
        """Iterate over what the reader makes, from a batch on."""
        grain = grain_or_error()
        from absl import flags  # Grain needs it, so it is there.

        stop = _ENDLESS if self.epochs is None else self.epochs * len(self)
        if first >= stop:
            return iter(())
        dataset = grain.MapDataset.range(first, stop).map(self._reader)
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        )
        if self.workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads flags that only an absl program would parse.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.workers, per_worker_buffer_size=2
                ),
                worker_init_fn=_start_worker,
            )
        return iter(dataset)

    def _count(self, problems):
        """Raise or count what was wrong with the examples of a batch."""
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
    """Hand out batches in their order; its state is the next one's number.

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
            # What was read ahead comes after the batch that failed.
            self.close()
            raise
        self._position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Tell the state after the batches that were handed out."""
        batches = self._batches
        return batches.get_state(self._position - batches._first)

    def set_state(self, state: dict[str, Any]):
        """Go on at a state, forwards or backwards."""
        position = self._batches._position(state)
        if position != self._position:
            self.close()
            self._position = position

    def close(self):
        """End worker processes; the next batch would start them again."""
        if hasattr(self._ahead, "close"):
            self._ahead.close()
        self._ahead = None


def _start_worker(worker, workers):
    """Keep a worker process from outliving its run, and off accelerators."""
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
    """End this process when the one that started it has died.

    Grain ends its workers from there, which a killed process does not do.
    """
    parent.join()
    os._exit(1)


def _check_integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. "
            f"Received: {value!r}."
        )
