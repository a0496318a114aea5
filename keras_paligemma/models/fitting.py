"""`fit`, `evaluate` and `predict`: their inputs, preprocessing and turns."""

import contextlib

import keras

from keras_paligemma.compat import process
from keras_paligemma.data.batches import as_dataset
from keras_paligemma.data.batches import filled
from keras_paligemma.data.batches import in_parts
from keras_paligemma.data.batches import split
from keras_paligemma.data.batches import steps_of
from keras_paligemma.interrupts import kept_interrupts
from keras_paligemma.models.inputs import check_compiled
from keras_paligemma.tuning.optimizers import check_built_for
from keras_paligemma.tuning.optimizers import check_moments
from keras_paligemma.tuning.trainable import check_trainable
from keras_paligemma.turns import alone


def fit(
    model,
    x=None,
    y=None,
    batch_size=None,
    sample_weight=None,
    validation_data=None,
    validation_split=None,
    shuffle=True,
    **kwargs,
):
    """Train on dictionaries of images, prompts and responses.

    Raw examples are preprocessed in Python, batch by batch, whatever the
    container; JAX and Torch trace no TensorFlow graph.

    Under a distribution, a batch that does not divide by its replicas, such as
    the last one, is filled up with rows of weight 0. The package's loss and
    weighted metrics leave them out; a Keras loss of your own counts them in its
    mean, unless its `reduction` is "mean_with_sample_weight".

    Args:
        x: dict of equally long lists (or arrays) `images`, `prompts`,
            `responses`, or of preprocessed arrays;
            `keras_paligemma.data.Batches`, whose `len` is an epoch; a
            `keras.utils.PyDataset`, a `tf.data` or Grain dataset, a Torch
            `DataLoader` or a generator of batches, raw or preprocessed. A
            raw batch is a dict of lists or arrays, or a tuple `(dict,
            None, sample_weight)`.
        y: `None`, since targets come from the responses. For a dict of
            preprocessed arrays: the response ids (B, R).
        batch_size: int, 32 if `None`; only for a dict.
        sample_weight: floats, one per example; only for a dict.
        validation_data: as `x`, or `(x, y, sample_weight)`.
        validation_split: float, fraction of a dict's examples, from its end,
            to validate on.
        shuffle: bool, whether to shuffle a dict's examples each epoch.
        **kwargs: as `keras.Model.fit` takes them.

    Returns:
        `keras.callbacks.History`.

    Raises:
        ValueError: if the model is not compiled, all its weights are frozen,
            or a TensorFlow strategy made it for several devices; if `x` is of
            another type, or arrays without `y`; if a callback leaves adapters
            off, merged, or switched to another one before a step.
    """
    _check_training(model, "fit")
    if model.optimizer is not None and not model.optimizer.built:
        # TensorFlow's trainer would create the optimizer's variables in the
        # first step, which would then be traced a second time.
        with _device_scope(model):
            model.optimizer.build(model.trainable_variables)
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = split(
            x, y, sample_weight, validation_split
        )
    steps = steps_of(x)
    kwargs.setdefault("steps_per_epoch", steps)
    x = _dataset(model, x, y, sample_weight, batch_size, shuffle)
    if validation_data is not None:
        # A list holds batches: Keras would unpack it as x, y and weights.
        if not isinstance(validation_data, tuple):
            validation_data = (validation_data,)
        x_y_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
        kwargs.setdefault("validation_steps", steps_of(x_y_weight[0]))
        kwargs["validation_data"] = _dataset(
            model, *x_y_weight, batch_size=batch_size
        )
    # Keras must not shuffle `Batches`, which have their own order, and it
    # cannot shuffle `tf.data` datasets.
    shuffle = shuffle and steps is None
    shuffle = shuffle and isinstance(x, keras.utils.PyDataset)
    callbacks = kwargs.pop("callbacks", None)
    with _batches_in_turn(model, "fit", callbacks) as callbacks:
        return keras.Model.fit(
            model, x, shuffle=shuffle, callbacks=callbacks, **kwargs
        )


def evaluate(
    model, x=None, y=None, batch_size=None, sample_weight=None, **kwargs
):
    """Compute loss and metrics; takes the arguments of `fit`."""
    callbacks = kwargs.pop("callbacks", None)
    if not kwargs.get("_use_cached_eval_dataset"):
        check_compiled(model, "evaluate")
        _check_devices(model, "evaluate")
        kwargs.setdefault("steps", steps_of(x))
        x, y = _dataset(model, x, y, sample_weight, batch_size), None
    with _batches_in_turn(model, "evaluate", callbacks) as callbacks:
        return keras.Model.evaluate(model, x, y, callbacks=callbacks, **kwargs)


def predict(model, x=None, batch_size=None, callbacks=None, **kwargs):
    """Return the logits of all text tokens; `x` is as in `fit`.

    These are the logits of training, given responses included; call `generate`
    for answers. The array is float32 (examples, tokens, V), in memory.

    Raises:
        ValueError: on several hosts, or as `fit`.
    """
    if process()[1] > 1:
        raise ValueError(
            "`predict` returns the logits of all examples, and no host holds "
            f"them. Received: {process()[1]} processes. Expected: one, or "
            "`score` or `generate`, which return those of this host."
        )
    kwargs.setdefault("steps", steps_of(x))
    data = as_dataset(
        x, None, None, batch_size, model.preprocess_samples, apart=False
    )
    with _batches_in_turn(model, "predict", callbacks) as callbacks:
        found = keras.Model.predict(model, data, callbacks=callbacks, **kwargs)
    # The last batch of a dictionary may have been filled up.
    columns = x.values() if isinstance(x, dict) else ()
    counts = [len(column) for column in columns if column is not None]
    return found[: counts[0]] if counts else found


@alone
def train_on_batch(model, x, y=None, sample_weight=None, **kwargs):
    """Train on one batch, given as in `fit`."""
    _check_training(model, "train_on_batch")
    batch = _training_batch(model, x, y, sample_weight)
    return keras.Model.train_on_batch(model, *batch, **kwargs)


@alone
def test_on_batch(model, x, y=None, sample_weight=None, **kwargs):
    """Compute loss and metrics of one batch, given as in `evaluate`."""
    check_compiled(model, "test_on_batch")
    batch = _training_batch(model, x, y, sample_weight)
    return keras.Model.test_on_batch(model, *batch, **kwargs)


class _GiveWay(keras.callbacks.Callback):
    """Callback that gives way to waiting threads before each batch.

    It does so before a batch, since callbacks at the end of a batch make JAX
    wait for the loss of each step.

    Args:
        turns: `Turns`, which this thread holds.
        name: str, the method that runs.
        interrupted: function that raises a `KeyboardInterrupt` if there was
            one that Keras dropped.
    """

    def __init__(self, turns, name, interrupted):
        super().__init__()
        self.turns = turns
        self.name = name
        self.interrupted = interrupted

    def on_train_batch_begin(self, batch, logs=None):
        self.on_test_batch_begin(batch)
        # Another callback may have switched or merged adapters.
        check_trainable(self.model.backbone, self.model.trained_adapter)

    def on_test_batch_begin(self, batch, logs=None):
        self.interrupted()
        if self.turns.wanted():
            self.turns.give_way(self.name)

    on_predict_batch_begin = on_test_batch_begin


@contextlib.contextmanager
def _batches_in_turn(model, name, callbacks):
    """Hold a model's lock, and give way before each batch.

    Args:
        model: `PaliGemmaCausalLM`.
        name: str, the method that runs: `fit`, `evaluate` or `predict`.
        callbacks: as Keras takes them.

    Yields:
        The callbacks to pass to Keras.

    Raises:
        ValueError: such a method is paused in another thread.
    """
    with model.turns as turns, kept_interrupts() as interrupted:
        turns.check_idle(name)
        # `fit` passes its own `CallbackList` to its validation.
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = keras.tree.flatten(callbacks or [])
            callbacks = [*callbacks, _GiveWay(turns, name, interrupted)]
        with turns.held_by(model):
            yield callbacks


def _check_training(model, method):
    """Raise `ValueError` if a step would change nothing, or the wrong weights.

    Args:
        model: `PaliGemmaCausalLM`.
        method: str, name of the method that was called.
    """
    check_compiled(model, method)
    _check_devices(model, method)
    trained = model.trainable_variables
    if not trained:
        raise ValueError(
            f"`{method}` would train nothing. Received: a model whose weights "
            "are all frozen. Expected: `unfreeze` or `enable_lora` first, and "
            "`compile` again."
        )
    check_moments(model.optimizer, trained)
    check_built_for(model.optimizer, trained)


def _check_devices(model, method):
    """Raise `ValueError` if TensorFlow would split the batches.

    Keras's trainer adds up the parts of a batch to read their shapes, which
    TensorFlow refuses for the masks.
    """
    if keras.backend.backend() != "tensorflow":
        return
    devices = model.distribute_strategy.num_replicas_in_sync
    if devices > 1:
        raise ValueError(
            f"`{method}` on TensorFlow uses one device. Received: a model made "
            f"in the scope of a strategy for {devices} devices. Expected: "
            "the JAX backend and `keras_paligemma.sharding.distribute`, or a "
            "model made outside of that scope."
        )


def _device_scope(model):
    """Return the scope in which TensorFlow creates a model's variables."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def _training_batch(model, x, y, sample_weight):
    batch = model.preprocess_samples(x, y, sample_weight)
    return filled(*in_parts(*keras.utils.unpack_x_y_sample_weight(batch)))


def _dataset(model, x, y, sample_weight, batch_size, shuffle=False):
    return as_dataset(
        x, y, sample_weight, batch_size, model.preprocess_samples, shuffle
    )
