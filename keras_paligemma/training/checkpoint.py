"""A run that can be killed at any step and goes on as if it had not been."""

import math
from pathlib import Path

import keras
import numpy as np


class RunCheckpoint(keras.callbacks.Callback):
    """Write what training changes, every so many steps, and restore it.

    That is: the trained weights, the optimizer, random seeds, the metrics of
    the epoch so far, and the number of the next batch. Frozen weights are not
    written: a run of adapters writes adapters. Orbax writes a checkpoint whole
    or not at all, and shards where the weights are sharded; one that was half
    written when the run was killed is never seen.

    `fit` of this module uses it as it is meant to be used.

    Args:
        directory: str or path, of this run alone.
        batches: `keras_paligemma.data.Batches` that the run trains on.
        every: int, steps from one checkpoint to the next; the last step of an
            epoch writes one too.
        keep: int, how many of the latest are kept.

    Raises:
        ValueError: while training begins: the checkpoint is another run's.

    Source: https://orbax.readthedocs.io.
    """

    def __init__(self, directory, batches, every=1000, keep=2):
        super().__init__()
        if every < 1 or keep < 1:
            raise ValueError(
                "`every` and `keep` are positive integers. Received: "
                f"every={every!r}, keep={keep!r}."
            )
        self.batches = batches
        self.every = every
        self._orbax = _orbax()
        self._manager = self._orbax.CheckpointManager(
            Path(directory).absolute(),
            options=self._orbax.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )
        self.step = 0
        self._metrics = None
        self._waits = self._manager.latest_step() is not None

    def restore(self, model):
        """Give a model what the latest checkpoint holds, without training.

        Args:
            model: `PaliGemmaCausalLM`, compiled.
        """
        self.set_model(model)
        self._restore()

    def read_again(self):
        """Let the next `fit` begin with what the last step wrote.

        Keras ends a `fit` with the means of weights, where there are any.
        """
        self._waits = True

    def steps_done(self):
        """Give the steps of the latest checkpoint; 0 if there is none."""
        return self._manager.latest_step() or 0

    def on_train_begin(self, logs=None):
        if self.model.steps_per_execution != 1:
            raise ValueError(
                "A run that goes on at any step is told of each. Received: "
                f"steps_per_execution={self.model.steps_per_execution}. "
                "Compile with 1."
            )
        if self._waits:
            self._restore()
        else:
            self.batches.set_state(self._place(self.step))

    def on_epoch_begin(self, epoch, logs=None):
        # Keras has just set them to zero.
        if self._metrics is not None:
            for variable, value in zip(
                self.model.metrics_variables, self._metrics, strict=True
            ):
                variable.assign(value)
            self._metrics = None

    def on_train_batch_end(self, batch, logs=None):
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} after step {self.step + 1}. The latest "
                f"checkpoint is of step {self.steps_done()}, before that. "
                "Lower the learning rate, clip gradients, or look at the "
                "examples of that step."
            )
        self.step += 1
        if self.step % self.every == 0 or self.step % len(self.batches) == 0:
            self._save()

    def _place(self, step):
        """Describe a step: JSON that Orbax keeps beside the arrays."""
        whole = self.batches.get_state(0)
        return whole | {"batches": step}

    def _state(self):
        """Collect the variables that a step changes, in groups."""
        model = self.model
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        frozen = model.non_trainable_variables
        return {
            "trained": model.trainable_variables,
            "optimizer": model.optimizer.variables,
            "random": [one for one in frozen if "seed" in one.path],
        }

    def _save(self):
        state = self._state()
        arguments = self._orbax.args
        self._manager.save(
            self.step,
            args=arguments.Composite(
                state=arguments.StandardSave(_values(state)),
                epoch_metrics=arguments.StandardSave(
                    _values(self.model.metrics_variables)
                ),
                place=arguments.JsonSave(
                    {"data": self._place(self.step), "shapes": _shapes(state)}
                ),
            ),
        )

    def _restore(self):
        step = self._manager.latest_step()
        arguments = self._orbax.args
        if not self.model.optimizer.built:
            # TensorFlow's trainer builds it within the first step.
            self.model.optimizer.build(self.model.trainable_variables)
        state = self._state()
        place = self._manager.restore(
            step, args=arguments.Composite(place=arguments.JsonRestore())
        ).place
        if place["shapes"] != _shapes(state):
            raise ValueError(
                f"The checkpoint of step {step} in {self._manager.directory} "
                "is of another run: other weights are trained, or by another "
                "optimizer. Received: "
                f"{_difference(place['shapes'], _shapes(state))}. Expected: "
                "the model as it was set up then, or a new directory."
            )
        self.batches.set_state(place["data"])
        found = self._read("state", _values(state))
        for group, variables in state.items():
            for variable, value in zip(variables, found[group], strict=True):
                variable.assign(value)
        # The metrics of an epoch that is over are of no use.
        if step % len(self.batches):
            _make_metrics(self.model)
            values = _values(self.model.metrics_variables)
            self._metrics = self._read("epoch_metrics", values)
        self.step = step
        self._waits = False

    def _read(self, item, like):
        """Read arrays of the latest checkpoint, laid out as others are."""
        arguments = self._orbax.args
        items = {item: arguments.StandardRestore(like)}
        return self._manager.restore(
            self._manager.latest_step(), args=arguments.Composite(**items)
        )[item]


def fit(
    model,
    batches,
    directory,
    epochs=1,
    *,
    every=1000,
    keep=2,
    callbacks=(),
    **kwargs,
):
    """Train, or go on where a run in this directory was killed.

    The losses of every step, the weights and the optimizer are those of a run
    that was never interrupted, bit for bit on the same devices. The state of
    other callbacks, such as the patience of early stopping, begins anew, and
    after what is left of an epoch once more: let `CSVLogger` append.

    Args:
        model: `PaliGemmaCausalLM`, compiled, set up as at the first start.
        batches: `keras_paligemma.data.Batches`.
        directory: str or path, of this run alone.
        epochs: int, in all.
        every: int, steps from one checkpoint to the next.
        keep: int, how many checkpoints are kept.
        callbacks: Keras callbacks.
        **kwargs: as `model.fit` takes them.

    Returns:
        `keras.callbacks.History` of the epochs that were trained now.

    Raises:
        ValueError: the directory holds another run; the loss is not finite.

    Example:

    ```python
    fit(model, batches, "runs/ghosts", epochs=3, every=200)
    ```
    """
    checkpoint = RunCheckpoint(directory, batches, every, keep)
    epoch, rest = divmod(checkpoint.steps_done(), len(batches))
    history = {}
    numbers = []
    # What is left of an epoch is an epoch of fewer steps to Keras.
    parts = []
    if rest and epoch < epochs:
        parts.append((epoch, epoch + 1, len(batches) - rest))
    if epoch + len(parts) < epochs:
        parts.append((epoch + len(parts), epochs, len(batches)))
    if not parts and checkpoint.steps_done():
        # Nothing is left to do, but the model is to be the trained one.
        checkpoint.restore(model)
        model.optimizer.finalize_variable_values(model.trainable_variables)
    for first, last, steps in parts:
        if numbers:
            if model.stop_training:
                break
            checkpoint.read_again()
        done = model.fit(
            batches,
            initial_epoch=first,
            epochs=last,
            steps_per_epoch=steps,
            callbacks=[checkpoint, *callbacks],
            **kwargs,
        )
        numbers += done.epoch
        for key, values in done.history.items():
            history.setdefault(key, []).extend(values)
    result = keras.callbacks.History()
    result.set_model(model)
    result.epoch, result.history = numbers, history
    return result


def _orbax():
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "Checkpoints of a run are written by Orbax. Install it: pip "
            "install 'keras_paligemma[train]'."
        ) from error
    return orbax.checkpoint


def _make_metrics(model):
    """Let a user's metrics make their variables, outside of a first step.

    Keras would do so too, but on TensorFlow within the step, which is too
    late. Their shapes are no matter of the number of tokens.
    """
    if not model.streams:
        y_BT = np.zeros((1, 2), "int32")
        vocabulary = model.backbone.text_config.vocabulary_size
        logits_BTV = np.zeros((1, 2, vocabulary), "float32")
        model.compute_metrics(None, y_BT, logits_BTV, np.ones((1, 2)))
        model.reset_metrics()


def _values(state):
    """Give the arrays of variables: JAX's own, on their shards, or NumPy's."""
    if keras.backend.backend() == "jax":
        return keras.tree.map_structure(lambda one: one.value, state)
    return keras.tree.map_structure(
        lambda one: np.asarray(keras.ops.convert_to_numpy(one)), state
    )


def _shapes(state):
    # Without names: those of an optimizer's variables tell how many models
    # were built before in the process.
    return {
        group: [[list(one.shape), one.dtype] for one in variables]
        for group, variables in state.items()
    }


def _difference(found, expected):
    for group, variables in expected.items():
        there = found.get(group, ())
        if len(there) != len(variables):
            return (
                f"{len(there)} arrays of {group!r} there, {len(variables)} here"
            )
        for one, other in zip(there, variables, strict=True):
            if one != other:
                return f"{one} among {group!r} there, {other} here"
    return "nothing that differs"
