"""Convert raw examples to the preprocessed batches that `fit` takes."""

import sys
from collections.abc import Iterator

import keras
import numpy as np

from keras_paligemma.compat import GeneratorDataAdapter
from keras_paligemma.compat import least
from keras_paligemma.compat import process
from keras_paligemma.compat import replicas
from keras_paligemma.data.pipeline import Batches
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.prompt_and_response import WHOLE_NAMES
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.preprocessing.realigning import ends_at_one_index
from keras_paligemma.preprocessing.realigning import realign

# Number of batches that Grain reads ahead.
READ_AHEAD = 8


class Examples(keras.utils.PyDataset):
    """Slice a dict of equally long lists or arrays into batches.

    Args:
        x: dict of lists or arrays, raw or preprocessed.
        y: array of targets, or `None`.
        sample_weight: array with one row per example, or `None`.
        batch_size: int.
        shuffle: bool, whether to shuffle each epoch.
    """

    def __init__(self, x, y, sample_weight, batch_size, shuffle=False):
        super().__init__()
        # `images=None` says that there are none, and so do its batches.
        is_text = "images" in x and x["images"] is None
        self.empty = {"images": None} if is_text else {}
        columns = x | {"y": y, "sample_weight": sample_weight}
        self.columns = {
            # Tensors are converted once, not in each batch.
            key: to_numpy(column) if hasattr(column, "shape") else column
            for key, column in columns.items()
            if column is not None
        }
        lengths = {key: len(column) for key, column in self.columns.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise ValueError(
                "All lists of a dictionary need the same length, at least "
                f"one. Received: {lengths}."
            )
        self.batch_size = batch_size
        self.order = np.arange(min(lengths.values()))
        self.shuffle = shuffle
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        return self.rows(self.order[start : start + self.batch_size])

    def rows(self, chosen):
        """Return the examples at these indices as `(x, y, sample_weight)`."""
        x = {
            key: column[chosen]
            if isinstance(column, np.ndarray)
            else [column[i] for i in chosen]
            for key, column in self.columns.items()
        }
        y, sample_weight = x.pop("y", None), x.pop("sample_weight", None)
        return x | self.empty, y, sample_weight

    def on_epoch_end(self):
        if self.shuffle:
            # Follows `keras.utils.set_random_seed`, which seeds NumPy.
            np.random.shuffle(self.order)


class PreprocessedBatches(keras.utils.PyDataset):
    """Preprocess the batches of another dataset on access."""

    def __init__(self, dataset, preprocess):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self.dataset = dataset
        self.preprocess = preprocess

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
            self.dataset[index]
        )
        return self.preprocess(x, y, sample_weight)

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class Numbered(keras.utils.PyDataset):
    """Access to the batches of a `Batches` by number, for Keras.

    Keras also takes a Grain data set, but it reads the first batches for their
    shapes, restarts in the same order each epoch, and does not know the
    length. Here a batch is a function of its number, so reading it twice is
    harmless, and `fit` with `steps_per_epoch` continues across epochs.
    """

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches
        self.iterator = iter(batches)
        # Keras reads the first batches for their shapes, and then again.
        self.first = {}

    @property
    def num_batches(self):
        return self.batches.total

    def __getitem__(self, index):
        # Read each time: a callback may set the state when `fit` begins.
        state = self.batches.get_state(index)
        number = state["batches"]
        if number in self.first:
            return self.first[number]
        self.iterator.set_state(state)
        batch = next(self.iterator)
        if index < 2:
            self.first[number] = batch
        else:
            self.first.clear()
        return batch


class Iterated(GeneratorDataAdapter):
    """Preprocess the batches of an iterable in Python.

    No TensorFlow graph is traced, whether the iterable is a `tf.data` dataset,
    a Grain dataset or Torch's `DataLoader`. Each epoch iterates anew.

    Args:
        dataset: iterable of raw or preprocessed batches: dicts, or tuples of
            them, targets and weights.
        preprocess: function of `(x, y, sample_weight)`.
    """

    def __init__(self, dataset, preprocess):

        def epoch():
            return _preprocessed(_iterator(dataset), preprocess)

        batches = epoch()
        if isinstance(dataset, Iterator):
            batches = _Once(batches)
        super().__init__(batches)
        self.generator = batches.epoch if isinstance(batches, _Once) else epoch
        self._length = _length(dataset)

    @property
    def num_batches(self):
        return self._length


class _Once(Iterator):
    """Batches of a generator, which can be read only once.

    Keras reads the first ones for their shapes, and perhaps to build the
    optimizer, before the first epoch. They are repeated until one behind them
    is read.

    Args:
        batches: iterator of batches.
    """

    def __init__(self, batches):
        self.batches = batches
        self.first = []

    def __next__(self):
        """Return one of the first batches, which is also kept."""
        batch = next(self.batches)
        self.first.append(batch)
        return batch

    def epoch(self):
        """Yield the batches of an epoch.

        Raises:
            ValueError: an earlier epoch has read them all.
        """
        is_empty = not self.first
        yield from self.first
        for batch in self.batches:
            is_empty, self.first = False, []
            yield batch
        if is_empty:
            raise ValueError(
                "The generator is used up: an earlier epoch has read all of "
                "its batches. Expected: an iterable that begins anew, such as "
                "a list of batches, `Batches` or a `PyDataset`; or a generator "
                "without end, and `steps_per_epoch`. Received: a generator."
            )


def _preprocessed(batches, preprocess):
    for batch in batches:
        yield preprocess(*keras.utils.unpack_x_y_sample_weight(batch))


def _iterator(dataset):
    if hasattr(dataset, "as_numpy_iterator"):
        return dataset.as_numpy_iterator()
    if hasattr(dataset, "to_iter_dataset"):
        import grain

        # By default 500 batches of pictures would be read ahead.
        options = grain.ReadOptions(
            num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD
        )
        dataset = dataset.to_iter_dataset(options)
    return iter(dataset)


def _length(dataset):
    """Return the batches per epoch; `None` if unknown or infinite."""
    if hasattr(dataset, "cardinality"):
        length = int(dataset.cardinality())
        return length if length >= 0 else None
    try:
        length = len(dataset)
    except TypeError:
        return None
    # The length that Grain gives a data set that repeats infinitely.
    return length if length < sys.maxsize else None


def steps_of(x) -> int | None:
    """Return the steps per epoch of `Batches`, whose iteration is endless."""
    return len(x) if isinstance(x, Batches) else None


def split(x, y, sample_weight, fraction):
    """Split off the last examples for validation, as Keras does.

    Args:
        x: dict of lists or arrays.
        y: array or `None`.
        sample_weight: array or `None`.
        fraction: float, fraction of the examples to validate on.

    Returns:
        Two tuples `(x, y, sample_weight)`: for training and validation.
    """
    if not isinstance(x, dict):
        raise ValueError(
            "`validation_split` divides a dictionary of lists or arrays. "
            f"Received: {type(x).__name__}. Pass `validation_data` instead."
        )
    examples = Examples(x, y, sample_weight, batch_size=1)
    count = len(examples)
    start = int(count * (1 - fraction))
    if not 0 < start < count:
        raise ValueError(
            "`validation_split` must leave at least one example on each side. "
            f"Received: validation_split={fraction} of {count} examples."
        )
    numbers = np.arange(count)
    return examples.rows(numbers[:start]), examples.rows(numbers[start:])


def in_batches(x, batch_size):
    """Split the inputs of `generate` into batches of one size.

    Args:
        x: dict of lists or arrays.
        batch_size: int.

    Returns:
        list of pairs: a dict of `batch_size` examples, padded by repeating the
        last one, and the number of examples that are not padding. `None` if
        `x` is one example, or fits into one batch.
    """
    batch_size = to_integer(batch_size, "batch_size")
    name = "token_ids" if "token_ids" in x else "prompts"
    if np.ndim(x.get(name, ())) < (2 if name == "token_ids" else 1):
        return None
    # No pictures, or the image tokens of one for all prompts.
    whole = {
        key: value
        for key, value in x.items()
        if value is None or (key == "image_embeddings" and np.ndim(value) == 2)
    }
    columns = {key: x[key] for key in x.keys() - whole.keys()}
    examples = Examples(columns, None, None, batch_size)
    last = len(examples.order) - 1
    if last < batch_size:
        return None
    return [
        (
            whole
            | examples.rows(np.minimum(start + np.arange(batch_size), last))[0],
            min(batch_size, last + 1 - start),
        )
        for start in range(0, last + 1, batch_size)
    ]


def in_parts(x, y=None, sample_weight=None):
    """Replace the whole texts of a batch by prompt and response in two parts.

    Args:
        x: dict of preprocessed arrays.
        y: int array (B, R), the responses; without them nothing changes.
        sample_weight: array (B, R) or `None`.

    Returns:
        `(x, y, sample_weight)`, `x` with the arrays of `PromptAndResponse`.
    """
    if y is None or "token_ids" not in x:
        return x, y, sample_weight
    whole = {name: x[name] for name in WHOLE_NAMES if x.get(name) is not None}
    others = {name: x[name] for name in x if name not in WHOLE_NAMES}
    whole = {name: to_numpy(array) for name, array in whole.items()}
    if not ends_at_one_index(whole, y.shape[1]):
        if others.keys() & {"attention_mask", "positions"}:
            raise ValueError(
                "A mask or positions of your own need prompts that end at "
                f"one index in every row. Received: {sorted(others)} beside "
                "prompts that do not."
            )
        whole, y, sample_weight = realign(whole, to_numpy(y), sample_weight)
    text = PromptAndResponse.cut(whole, y.shape[1])
    return others | text.arrays(), y, sample_weight


def rows_divide_by():
    """Return what the rows of this process's batches must divide by."""
    return max(1, replicas() // process()[1])


def check_steps(steps):
    """Raise if the hosts would not all take part in each step.

    Args:
        steps: int, number of batches on this host.
    """
    fewest, most = least(steps), -least(-steps)
    if fewest != most:
        raise ValueError(
            "Hosts run each step together, so each needs as many batches. "
            f"Received: {steps} batches on this host, and from {fewest} to "
            f"{most} on all. Expected: dictionaries of one length, or "
            "`Batches(…, shard=data_shard())`, which share any number of "
            "examples."
        )


def filled(x, y=None, sample_weight=None, multiple=None):
    """Fill up a batch, so that a distribution can split it.

    Keras places all batches as the first, so the last must divide, too. The
    new rows repeat the last one and have weight 0.

    Args:
        x: dict of preprocessed arrays.
        y: int array (B, R) or `None`.
        sample_weight: array (B, R) or `None`.
        multiple: int, what the rows must divide by; `None` is
            `rows_divide_by()`.

    Returns:
        `(x, y, sample_weight)`.
    """
    arrays = {name: array for name, array in x.items() if array is not None}
    count = len(next(iter(arrays.values())))
    more = -count % (multiple or rows_divide_by())
    if not more:
        return x, y, sample_weight

    def longer(array):
        array = to_numpy(array)
        return np.concatenate([array, np.repeat(array[-1:], more, 0)])

    x = x | {name: longer(array) for name, array in arrays.items()}
    if y is None:
        return x, y, sample_weight
    if sample_weight is None:
        sample_weight = np.ones(y.shape, "float32")
    sample_weight = longer(sample_weight)
    sample_weight[count:] = 0
    return x, longer(y), sample_weight


def as_dataset(
    x,
    y,
    sample_weight,
    batch_size,
    preprocess,
    shuffle=False,
    apart=True,
):
    """Return the inputs of `fit` as a data set of preprocessed batches.

    Args:
        x: as `PaliGemmaCausalLM.fit` takes it.
        y: `None`, if targets come from the responses; the targets of a dict
            of preprocessed arrays.
        sample_weight: `None`, or one weight per example of a dict.
        batch_size: int, 32 if `None`; only for a dict.
        preprocess: function of `(x, y, sample_weight)`.
        shuffle: bool, whether to shuffle the examples of a dict each epoch.
        apart: bool, whether to split prompts and responses, see `in_parts`.
            `False` is for results of each example: of a dictionary, only the
            end of the last batch may be filled up.

    Returns:
        What `keras.Model.fit` takes.
    """

    def prepared(*batch):
        batch = keras.utils.unpack_x_y_sample_weight(preprocess(*batch))
        batch = in_parts(*batch) if apart else batch
        full = filled(*batch, multiple=multiple)
        if full[0] is not batch[0] and not (apart or is_dict):
            raise ValueError(
                "The rows that fill up a batch can only be cut off the end of "
                "a dictionary's results. Received: a batch that does not "
                f"divide by the {rows_divide_by()} parts that the distribution "
                "splits it into. Expected: a dictionary, or other batches."
            )
        packed = keras.utils.pack_x_y_sample_weight(*full)
        # Keras takes no iterables of dictionaries.
        return packed if isinstance(packed, tuple) else (packed,)

    is_dict = isinstance(x, dict)
    multiple = rows_divide_by()
    if is_dict:
        if y is not None and "token_ids" not in x:
            raise ValueError(
                "Targets come from the responses. Received: y. Expected: "
                "a dict with 'images', 'prompts' and 'responses', no y."
            )
        batch_size = batch_size or 32
        if not apart:
            # Only the last batch is filled up.
            batch_size += -batch_size % multiple
        x = Examples(x, y, sample_weight, batch_size, shuffle)
        if process()[1] > 1:
            # The last batches of hosts may differ in length.
            multiple = batch_size + -batch_size % multiple
            check_steps(len(x))
    elif y is not None or sample_weight is not None:
        raise ValueError(
            "The batches of a data set hold their own targets and weights: "
            "(x, y, sample_weight), y `None` where x is raw. Received: "
            f"{'y' if y is not None else 'sample_weight'} beside "
            f"{type(x).__name__}. Expected: neither, or a dictionary as x."
        )
    if isinstance(x, Batches):
        x = Numbered(x)
    if isinstance(x, keras.utils.PyDataset):
        return PreprocessedBatches(x, prepared)
    if hasattr(x, "__iter__") and not hasattr(x, "shape"):
        return Iterated(x, prepared)
    raise ValueError(
        "This cannot be trained on or predicted from. Received: "
        f"{type(x).__name__}. Expected: a dictionary of lists or arrays, a "
        "`keras.utils.PyDataset`, `keras_paligemma.data.Batches`, or an "
        "iterable of batches: a `tf.data` or Grain dataset, a Torch "
        "DataLoader, a generator."
    )
