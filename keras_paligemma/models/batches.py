"""Raw examples to preprocessed batches, as `fit` asks for them."""

import keras
import numpy as np

from keras_paligemma.data.pipeline import Batches


class Examples(keras.utils.PyDataset):
    """Slice a dict of equally long lists into batches of raw examples."""

    def __init__(self, examples, batch_size, shuffle=False):
        super().__init__()
        lengths = {key: len(value) for key, value in examples.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise ValueError(
                "All lists of a dictionary need the same length, at least "
                f"one. Received: {lengths}."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.order = np.arange(min(lengths.values()))
        self.shuffle = shuffle
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.order) // self.batch_size)

    def __getitem__(self, index):
        start = index * self.batch_size
        chosen = self.order[start : start + self.batch_size]
        return {
            key: [values[i] for i in chosen]
            for key, values in self.examples.items()
        }

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


def steps_of(x) -> int | None:
    """Steps of an epoch where Keras cannot know: `Batches` have no end."""
    return len(x) if isinstance(x, Batches) else None


def as_dataset(x, y, batch_size, preprocess, shuffle=False):
    """Make what `fit` was given a data set of preprocessed batches.

    Args:
        x: as `PaliGemmaCausalLM.fit` takes it.
        y: `None`; targets come from the responses.
        batch_size: int, 32 if `None`; only for a dict.
        preprocess: function of `(x, y, sample_weight)`.
        shuffle: bool, draw the examples of a dict in another order each epoch.

    Returns:
        What `keras.Model.fit` takes.
    """
    if y is not None and isinstance(x, (dict, Batches)):
        raise ValueError(
            "Targets come from the responses. Received: y. Expected: "
            "a dict with 'images', 'prompts' and 'responses', no y."
        )
    if isinstance(x, dict):
        x = Examples(x, batch_size or 32, shuffle)
    if isinstance(x, Batches):
        x = Numbered(x)
    if isinstance(x, keras.utils.PyDataset):
        x = PreprocessedBatches(x, preprocess)
    if "prompts" in str(getattr(x, "element_spec", "")):
        raise ValueError(
            "Raw text in a tf.data dataset cannot be preprocessed: that "
            "runs in Python, not in a graph. Received: "
            f"{x.element_spec}. Expected: a dict of lists, a "
            "keras.utils.PyDataset of raw batches, or a Grain dataset "
            "with `.map(model.preprocessor)`."
        )
    return x
