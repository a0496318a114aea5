"""Runs that can be killed at any step and resume with the same results."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_paligemma.data.pipeline import Batches
from keras_paligemma.training.checkpoint_files import CheckpointFiles
from keras_paligemma.types import PathLike

if TYPE_CHECKING:
    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM


# Weights of adapters that begin with random or constant values.
DRAWN = ("/adapter_a", "/adapter_b", "/adapter_bias", "/adapter_gain")
# Arguments of Keras's `fit` that follow from the state of a run.
OF_A_RUN = {"steps_per_epoch", "initial_epoch"}


class RunCheckpoint(keras.callbacks.Callback):
    """Write the state of training at intervals, and restore it.

    The state is the trained weights, the optimizer, random seeds, the metrics
    of the current epoch, and the number of the next batch. Frozen weights of
    the model are not written: a run that trains adapters writes adapters. Orbax
    writes checkpoints atomically, so an interrupted checkpoint is ignored. It
    shards them as the weights are sharded. If the newest checkpoint was damaged
    later, the newest intact checkpoint is restored, with a warning.

    It is the last of the callbacks, so that a checkpoint has what the others
    changed, such as the learning rate. `training.fit` uses it.

    Args:
        directory: str or path, a folder for this run alone.
        batches: `keras_paligemma.data.Batches` that the run trains on.
        every: int, steps between checkpoints. Others are written at the end of
            an epoch, and one step before: if the run is killed while it
            validates, this step and the end of the epoch are repeated.
        keep: int, number of the latest checkpoints to keep.

    Raises:
        ValueError: `every` or `keep` is not positive, or other data than
            `Batches`; or when training starts, the checkpoint is of another
            run, or none is intact.
        OSError: during training, a checkpoint cannot be written.
    """

    def __init__(
        self,
        directory: PathLike,
        batches: Batches,
        every: int = 1000,
        keep: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(batches, Batches):
            raise ValueError(
                "A run that can be resumed takes `Batches`. Received: "
                f"{type(batches).__name__}. Expected: `keras_paligemma.data."
                "Batches(source, model.preprocessor, batch_size)`; or "
                "`model.fit`, which takes other data."
            )
        if every < 1 or keep < 1:
            raise ValueError(
                "`every` and `keep` are positive integers. Received: "
                f"every={every!r}, keep={keep!r}."
            )
        self.batches = batches
        self.every = every
        self._files = CheckpointFiles(directory, keep)
        self.step = 0
        # Variables and their values in the middle of an epoch.
        self._begun = []
        self._waits = self._files.latest() is not None

    def restore(self, model: "PaliGemmaCausalLM") -> None:
        """Load the newest intact checkpoint, if there is any, into a model.

        Args:
            model: `PaliGemmaCausalLM`, compiled.
        """
        self.set_model(model)
        if self._waits:
            self._restore()

    def read_again(self) -> None:
        """Restore the last checkpoint when the next `fit` begins.

        At the end of each `fit`, Keras replaces weights with their moving
        averages, if the optimizer has any.
        """
        self._waits = True

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
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

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        # Keras has reset the metrics, and callbacks may have set the learning
        # rate, as at the beginning of an epoch.
        for variable, value in self._begun:
            variable.assign(value)
        self._begun = []

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        loss = float((logs or {}).get("loss", 0.0))
        self.step += 1
        if not math.isfinite(loss):
            self._stop(f"The loss is {loss}")
        left = -self.step % len(self.batches)
        if left == 1 or left and self.step % self.every == 0:
            self._save()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if self.step % len(self.batches) == 0:
            self._save()

    def _place(self, step):
        """Return the state of the data at a step, as JSON values."""
        return self.batches.get_state() | {"batches": step}

    def _state(self):
        """Return the variables that a step changes, in groups."""
        model = self.model
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        frozen = model.non_trainable_variables
        return {
            "trained": model.trainable_variables,
            "optimizer": model.optimizer.variables,
            # An adapter's frozen weights are drawn, not read from a file.
            "random": [
                variable
                for variable in frozen
                if "seed" in variable.path or variable.path.endswith(DRAWN)
            ],
        }

    def _stop(self, what):
        raise ValueError(
            f"{what} after step {self.step}. The latest checkpoint is of step "
            f"{self._files.latest() or 0}, before that. Lower the learning "
            "rate, clip gradients, or look at the examples of that step."
        )

    def _save(self):
        state = self._state()
        # The loss was computed before the step. A mean needs no memory.
        means = [ops.cast(ops.mean(v), "float32") for v in state["trained"]]
        if not ops.all(ops.isfinite(ops.stack(means))):
            self._stop("A trained weight is not finite")
        self._files.write(
            self.step,
            {"data": self._place(self.step), "shapes": _shapes(state)},
            {
                "state": _values(state),
                "epoch_metrics": _values(self.model.metrics_variables),
            },
        )

    def _restore(self):
        if not self.model.optimizer.built:
            # TensorFlow's trainer builds the optimizer in the first step.
            self.model.optimizer.build(self.model.trainable_variables)
        state = self._state()

        def wanted(step, place):
            self._check_run(step, place, _shapes(state))
            arrays = {"state": _values(state)}
            # The metrics of a finished epoch are not needed.
            if step % len(self.batches):
                metrics = self.model.metrics_variables
                arrays["epoch_metrics"] = _values(metrics)
            return arrays

        self.step, place, found = self._files.read_newest(wanted)
        self.batches.set_state(place["data"])
        for group, variables in state.items():
            values = found["state"][group]
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        self._begun = []
        if self.step % len(self.batches):
            metrics = self.model.metrics_variables
            self._begun += zip(metrics, found["epoch_metrics"], strict=True)
            optimizer = zip(
                state["optimizer"], found["state"]["optimizer"], strict=True
            )
            self._begun += [
                (variable, value)
                for variable, value in optimizer
                if variable.path.endswith("learning_rate")
            ]
        self._waits = False

    def _check_run(self, step, place, shapes):
        if place["shapes"] != shapes:
            raise ValueError(
                f"The checkpoint of step {step} in {self._files.directory} is "
                "of another run: other weights are trained, or by another "
                "optimizer. Received: "
                f"{_difference(place['shapes'], shapes)}. Expected: the model "
                "as it was set up then, or a new directory."
            )


def fit(
    model: "PaliGemmaCausalLM",
    batches: Batches,
    directory: PathLike,
    epochs: int = 1,
    *,
    every: int = 1000,
    keep: int = 2,
    callbacks: Sequence[keras.callbacks.Callback] | None = (),
    **kwargs: Any,
) -> keras.callbacks.History:
    """Train, or resume a killed run in this directory.

    The losses of all steps, the weights and the optimizer are those of an
    uninterrupted run, bit for bit on the same devices. Callbacks keep the
    learning rate that they have set, but else start anew when a run resumes,
    such as the patience of early stopping, and again after the rest of an
    interrupted epoch: let `CSVLogger` append.

    Args:
        model: `PaliGemmaCausalLM`, compiled, and set up as when the run was
            started first.
        batches: `keras_paligemma.data.Batches`.
        directory: str or path, a folder for this run alone.
        epochs: int, total number of epochs.
        every: int, steps between checkpoints.
        keep: int, number of checkpoints to keep.
        callbacks: list of Keras callbacks, or `None`.
        **kwargs: further arguments of `model.fit`, without
            `steps_per_epoch` and `initial_epoch`.

    Returns:
        `keras.callbacks.History` of the epochs trained in this call.

    Raises:
        ValueError: the directory holds another run, or no checkpoint in it is
            intact; other data than `Batches`, or batches that end before
            `epochs`; or the loss or a trained weight is not finite.
        OSError: a checkpoint cannot be written.

    Example:

    ```python
    fit(model, batches, "runs/ghosts", epochs=3, every=200)
    ```
    """
    for name in OF_A_RUN & kwargs.keys():
        raise ValueError(
            "A run that can be resumed counts its steps itself. Received: "
            f"{name}={kwargs[name]!r}. Expected: `epochs` in all; an epoch is "
            "as long as the batches."
        )
    checkpoint = RunCheckpoint(directory, batches, every, keep)
    if batches.epochs is not None and batches.epochs < epochs:
        raise ValueError(
            f"The batches end before the run. Received: Batches(…, epochs="
            f"{batches.epochs}) for epochs={epochs}. Expected: batches without "
            "`epochs`, which have no end."
        )
    checkpoint.restore(model)
    epoch, rest = divmod(checkpoint.step, len(batches))
    history = {}
    numbers = []
    # For Keras, the rest of an epoch is an epoch with fewer steps.
    parts = []
    if rest and epoch < epochs:
        parts.append((epoch, epoch + 1, len(batches) - rest))
    if epoch + len(parts) < epochs:
        parts.append((epoch + len(parts), epochs, len(batches)))
    if not parts and checkpoint.step:
        # Training is complete: only replace weights by their averages, as `fit`
        # does at its end.
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
            callbacks=[*(callbacks or ()), checkpoint],
            **kwargs,
        )
        numbers += done.epoch
        for key, values in done.history.items():
            history.setdefault(key, []).extend(values)
    result = keras.callbacks.History()
    result.set_model(model)
    result.epoch, result.history = numbers, history
    return result


def _values(state):
    """Return values of variables: sharded JAX arrays, or NumPy arrays."""
    if keras.backend.backend() == "jax":
        return keras.tree.map_structure(lambda variable: variable.value, state)
    return keras.tree.map_structure(
        lambda variable: np.asarray(ops.convert_to_numpy(variable)), state
    )


def _shapes(state):
    # Without names: names of an optimizer's variables depend on the number of
    # models that the process has built.
    def described(variable):
        # The shape of a square kernel does not show the order of axes.
        order = getattr(variable, "outputs_first", 0)
        shape = [list(variable.shape), variable.dtype]
        return [*shape, "outputs first"] if order else shape

    return {
        group: [described(variable) for variable in variables]
        for group, variables in state.items()
    }


def _difference(found, expected):
    for group, variables in expected.items():
        there = found.get(group, ())
        if len(there) != len(variables):
            return (
                f"{len(there)} arrays of {group!r} there, {len(variables)} here"
            )
        for entry, other in zip(there, variables, strict=True):
            if entry != other:
                return f"{entry} among {group!r} there, {other} here"
    return "nothing that differs"
