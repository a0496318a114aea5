"""Raw examples to preprocessed batches, as `fit` asks for them."""

import keras
import numpy as np


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


def as_batches(x, y=None, batch_size=None, shuffle=False, preprocess=None):
    """Turn what `fit` is given into batches that Keras trains on.

    Args:
        x: see `PaliGemmaCausalLM.fit`.
        y: `None` where `x` is a dict.
        batch_size: int, 32 if `None`; only for a dict.
        shuffle: bool, only for a dict.
        preprocess: function of raw (x, y, sample_weight).

    Returns:
        Pair of x and y.

    Raises:
        ValueError: targets beside a dict, or raw text in a `tf.data` dataset.
    """
    if isinstance(x, dict):
        if y is not None:
            raise ValueError(
                "Targets come from the responses. Received: y. Expected: "
                "a dict with 'images', 'prompts' and 'responses', no y."
            )
        x = Examples(x, batch_size or 32, shuffle)
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
    return x, y
