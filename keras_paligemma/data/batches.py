"""Raw examples to preprocessed batches, as `fit` asks for them."""

import sys
from collections.abc import Iterator

import keras
import numpy as np

from keras_paligemma.compat import GeneratorDataAdapter
from keras_paligemma.data.pipeline import Batches
from keras_paligemma.preprocessing.graph import is_symbolic
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.prompt_and_response import WHOLE_NAMES
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse
from keras_paligemma.preprocessing.prompt_and_response import ends_at_one_index
from keras_paligemma.preprocessing.prompt_and_response import realign

# Batches that Grain reads ahead.
READ_AHEAD = 8


class Examples(keras.utils.PyDataset):
    """Slice a dict of equally long lists or arrays into batches.

    Args:
        x: dict of lists or arrays, raw or preprocessed.
        y: array of targets, or `None`.
        sample_weight: array of one row an example, or `None`.
        batch_size: int.
        shuffle: bool, another order each epoch.
    """

    def __init__(self, x, y, sample_weight, batch_size, shuffle=False):
        super().__init__()
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
        """Return the examples of these numbers as `(x, y, sample_weight)`."""
        x = {
            key: column[chosen]
            if isinstance(column, np.ndarray)
            else [column[i] for i in chosen]
            for key, column in self.columns.items()
        }
        return x, x.pop("y", None), x.pop("sample_weight", None)

    def on_epoch_end(self):
        if self.shuffle:
            # Follows `keras.utils.set_random_seed`, which seeds NumPy.
            np.random.shuffle(self.order)


class PreprocessedBatches(keras.utils.PyDataset):
    """Preprocess the batches of another dataset as they are asked for."""

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

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


class Numbered(keras.utils.PyDataset):
    """Give Keras the batches of a `Batches` by number.

    Keras would take a Grain data set too, but reads its first batches to see
    their shapes, begins it anew each epoch, in the same order, and knows no
    length. Numbers make all of that harmless: a batch is a function of its
    number, and `fit` with `steps_per_epoch` goes on counting over epochs.
    """

    def __init__(self, batches: Batches):
        super().__init__()
        self.batches = batches
        self.iterator = iter(batches)
        # Keras reads shapes off the first batches, then begins with them.
        self.first = {}

    @property
    def num_batches(self):
        return self.batches.total

    def __getitem__(self, index):
        # Asked anew each time: a callback may set the state as `fit` begins.
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
    """Preprocess the batches of what can only be iterated over, in Python.

    No TensorFlow graph is traced, whatever gives the batches: a `tf.data`
    dataset, Grain's datasets, Torch's `DataLoader`. Each epoch iterates anew.

    Args:
        dataset: iterable of raw or preprocessed batches: dicts, or tuples of
            them, targets and weights.
        preprocess: function of `(x, y, sample_weight)`.
    """

    def __init__(self, dataset, preprocess):
        # A generator has one pass: the batches that the base class looks at
        # first are given back.
        super().__init__(_preprocessed(_iterator(dataset), preprocess))
        if not isinstance(dataset, Iterator):
            self.generator = lambda: _preprocessed(
                _iterator(dataset), preprocess
            )
        self._length = _length(dataset)

    @property
    def num_batches(self):
        return self._length


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
    """Count the batches of an epoch; `None` if unknown or without end."""
    if hasattr(dataset, "cardinality"):
        length = int(dataset.cardinality())
        return length if length >= 0 else None
    try:
        length = len(dataset)
    except TypeError:
        return None
    # How Grain says that it repeats without end.
    return length if length < sys.maxsize else None


def steps_of(x) -> int | None:
    """Steps of an epoch where Keras cannot know: `Batches` have no end."""
    return len(x) if isinstance(x, Batches) else None


def split(x, y, sample_weight, fraction):
    """Split the last examples off for validation, as Keras does.

    Args:
        x: dict of lists or arrays.
        y: array or `None`.
        sample_weight: array or `None`.
        fraction: float, the share of the examples that validate.

    Returns:
        Two tuples `(x, y, sample_weight)`: to train and to validate.
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
    """Slice what `generate` takes into batches of one size.

    Args:
        x: dict of lists or arrays.
        batch_size: int.

    Returns:
        List of pairs: a dict of `batch_size` examples, the last ones repeated
        where there are too few, and how many are no repetition. `None` if `x`
        is one example, or one batch has all.
    """
    if isinstance(batch_size, bool) or not (
        isinstance(batch_size, int) and batch_size > 0
    ):
        raise ValueError(
            f"`batch_size` is a positive integer. Received: {batch_size!r}."
        )
    name = "token_ids" if "token_ids" in x else "prompts"
    if np.ndim(x.get(name, ())) < (2 if name == "token_ids" else 1):
        return None
    examples = Examples(x, None, None, batch_size)
    last = len(examples.order) - 1
    if last < batch_size:
        return None
    return [
        (
            examples.rows(np.minimum(start + np.arange(batch_size), last))[0],
            min(batch_size, last + 1 - start),
        )
        for start in range(0, last + 1, batch_size)
    ]


def in_parts(x, y=None, sample_weight=None):
    """Put prompt and response, apart, in the place of a batch's whole texts.

    Args:
        x: dict of preprocessed arrays, of NumPy or of a TensorFlow graph.
        y: int array (B, R), the responses; without them nothing changes.
        sample_weight: array (B, R) or `None`.

    Returns:
        `(x, y, sample_weight)`, `x` with the arrays of `PromptAndResponse`.
    """
    if y is None or "token_ids" not in x:
        return x, y, sample_weight
    whole = {name: x[name] for name in WHOLE_NAMES if x.get(name) is not None}
    others = {name: x[name] for name in x if name not in WHOLE_NAMES}
    if not is_symbolic(whole):
        whole = {name: to_numpy(array) for name, array in whole.items()}
        if not ends_at_one_index(whole, y.shape[1]):
            if others.keys() & {"attention_mask", "positions"}:
                raise ValueError(
                    "A mask or positions of your own need prompts that end at "
                    "one index in every row. Received: "
                    f"{sorted(others)} beside prompts that do not."
                )
            whole, y, sample_weight = realign(whole, to_numpy(y), sample_weight)
    text = PromptAndResponse.cut(whole, y.shape[1])
    return others | text.arrays(), y, sample_weight


def as_dataset(
    x,
    y,
    sample_weight,
    batch_size,
    preprocess,
    shuffle=False,
    apart=True,
):
    """Make what `fit` was given a data set of preprocessed batches.

    Args:
        x: as `PaliGemmaCausalLM.fit` takes it.
        y: `None`, where targets come from the responses; the targets of a
            dict of preprocessed arrays.
        sample_weight: `None`, or one weight an example of a dict.
        batch_size: int, 32 if `None`; only for a dict.
        preprocess: function of `(x, y, sample_weight)`.
        shuffle: bool, draw the examples of a dict in another order each epoch.
        apart: bool, give prompts and responses apart, see `in_parts`.

    Returns:
        What `keras.Model.fit` takes.
    """

    def prepared(*batch):
        batch = preprocess(*batch)
        if apart:
            batch = in_parts(*keras.utils.unpack_x_y_sample_weight(batch))
        return batch

    if isinstance(x, dict):
        if y is not None and "token_ids" not in x:
            raise ValueError(
                "Targets come from the responses. Received: y. Expected: "
                "a dict with 'images', 'prompts' and 'responses', no y."
            )
        x = Examples(x, y, sample_weight, batch_size or 32, shuffle)
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
    if "token_ids" in str(getattr(x, "element_spec", "")):
        # A `tf.data` pipeline of preprocessed batches stays one.
        return x.map(in_parts) if apart else x
    if hasattr(x, "__iter__") and not hasattr(x, "shape"):
        return Iterated(x, prepared)
    raise ValueError(
        "This cannot be trained on or predicted from. Received: "
        f"{type(x).__name__}. Expected: a dictionary of lists or arrays, a "
        "`keras.utils.PyDataset`, `keras_paligemma.data.Batches`, or an "
        "iterable of batches: a `tf.data` or Grain dataset, a Torch "
        "DataLoader, a generator."
    )
