"""Killed runs resume exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_paligemma import Adam
from keras_paligemma.lora_config import LoraConfig
from keras_paligemma.training import RunCheckpoint
from keras_paligemma.training import fit
from tests.helpers.processes import LEAN
from tests.training import killed_run

ROOT = Path(__file__).parents[2]


def run(folder, kill_at=None):
    """Train in a separate process, which may kill itself at a step."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.killed_run", str(folder)]
        + ([] if kill_at is None else [str(kill_at)]),
        cwd=ROOT,
        env=os.environ | LEAN | {"KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    if kill_at is None:
        assert result.returncode == 0, result.stderr[-3000:]
    else:
        assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


def losses(folder):
    """Return the last loss written for each step, and the final values."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return {
        row["step"]: row["loss"] for row in (json.loads(line) for line in lines)
    }


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    killed_run.main(whole)
    # Between checkpoints of the first epoch, and in the second epoch.
    run(killed, kill_at=4)
    run(killed, kill_at=8)
    # The remains of a killed writer are never taken for a checkpoint.
    half = killed / "run" / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_bytes(b"half")
    run(killed)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 12
    with np.load(whole / "end.npz") as one, np.load(killed / "end.npz") as two:
        assert set(one.files) == set(two.files)
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])
    kept = [int(path.name) for path in (whole / "run").iterdir()]
    assert sorted(kept) == [11, 12]


@pytest.fixture
def model_and_batches():
    return killed_run.set_up()


class Stop(keras.callbacks.Callback):
    """Interrupt the fifth step of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 4:
            raise InterruptedError


def test_metrics_of_an_epoch_go_on(tmp_path):
    def train(folder, *callbacks):
        model, batches = killed_run.set_up()
        model.compile(
            Adam(1e-2), weighted_metrics=["sparse_categorical_accuracy"]
        )
        folder = tmp_path / folder
        return fit(model, batches, folder, every=3, callbacks=callbacks).history

    with pytest.raises(InterruptedError):
        train("stopped", Stop())
    # The metrics cover the whole epoch, not only the steps since the
    # checkpoint.
    assert train("stopped") == train("whole")


def test_means_of_weights_go_on(tmp_path):
    """Keras assigns the averages at the end of a resumed run's two fits."""

    def train(folder, *callbacks):
        model, batches = killed_run.set_up()
        model.compile(Adam(1e-2, use_ema=True, ema_momentum=0.5))
        fit(
            model,
            batches,
            tmp_path / folder,
            2,
            every=3,
            callbacks=callbacks,
            verbose=0,
        )
        return [np.array(variable) for variable in model.trainable_variables]

    with pytest.raises(InterruptedError):
        train("stopped", Stop())
    whole = train("whole")
    # The second call only restores.
    for found in (train("stopped"), train("stopped")):
        for value, other in zip(found, whole, strict=True):
            np.testing.assert_array_equal(value, other)


def test_the_learning_rate_of_callbacks_goes_on(tmp_path):
    """Callbacks halve it as an epoch begins, and again as it ends."""

    def train(folder, *callbacks):
        model, batches = killed_run.set_up()
        model.compile(Adam(1e-2))
        halve = keras.callbacks.LearningRateScheduler(
            lambda epoch, rate: rate * 0.5
        )
        rates = []

        def look(batch, logs):
            with model.turns:
                rates.append(float(model.optimizer.learning_rate))

        def lower(epoch, logs):
            rate = model.optimizer.learning_rate
            model.optimizer.learning_rate = float(rate) * 0.5

        look = keras.callbacks.LambdaCallback(
            on_train_batch_end=look, on_epoch_end=lower
        )
        try:
            fit(
                model,
                batches,
                tmp_path / folder,
                2,
                every=3,
                callbacks=[halve, look, *callbacks],
                verbose=0,
            )
        except InterruptedError:
            return train(folder)
        return rates

    assert train("stopped", Stop()) == train("whole")[3:]


@pytest.mark.any_backend
def test_a_validation_that_is_killed_is_repeated(tmp_path):
    class Kill(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise InterruptedError

    def train(*callbacks):
        model, batches = killed_run.set_up()
        return fit(
            model,
            batches,
            tmp_path,
            1,
            callbacks=callbacks,
            validation_data=batches,
            validation_steps=1,
            verbose=0,
        )

    with pytest.raises(InterruptedError):
        train(Kill())
    done = train()
    assert done.epoch == [0] and "val_loss" in done.history
    assert train().epoch == []


@pytest.mark.any_backend
def test_frozen_adapters_go_on(tmp_path):
    def train(seed, *callbacks):
        model, batches = killed_run.set_up()
        keras.utils.set_random_seed(seed)
        model.adapters.assign(model.adapters.variables.draw(LoraConfig(2)))
        model.freeze("*/adapter_a")
        model.compile(Adam(1e-2))
        fit(
            model,
            batches,
            tmp_path,
            1,
            every=3,
            callbacks=callbacks,
            verbose=0,
        )
        return model.adapters.values("default")

    with pytest.raises(InterruptedError):
        train(1, Stop())
    found = train(2)
    [path] = {name for name in found if name.endswith("query/adapter_a")}
    keras.utils.set_random_seed(1)
    model, _ = killed_run.set_up()
    keras.utils.set_random_seed(1)
    drawn = model.adapters.variables.draw(LoraConfig(2))
    np.testing.assert_array_equal(found[path], drawn[path])


@pytest.mark.any_backend
def test_batches_that_end_before_the_run(model_and_batches, tmp_path):
    model, batches = model_and_batches
    batches.epochs = 1
    with pytest.raises(ValueError, match="end before the run.*epochs=2"):
        fit(model, batches, tmp_path, 2, verbose=0)


@pytest.mark.any_backend
def test_data_and_steps_that_a_run_cannot_take(model_and_batches, tmp_path):
    model, batches = model_and_batches
    for data in ({"prompts": ["a"]}, [batches], None):
        with pytest.raises(ValueError, match="takes `Batches`. Received"):
            fit(model, data, tmp_path, verbose=0)
        with pytest.raises(ValueError, match="takes `Batches`. Received"):
            RunCheckpoint(tmp_path, data)
    for name in ("steps_per_epoch", "initial_epoch"):
        with pytest.raises(ValueError, match=f"itself. Received: {name}=2"):
            fit(model, batches, tmp_path, verbose=0, **{name: 2})


@pytest.mark.any_backend
def test_what_stops_an_epochs_rest_stops_the_run(tmp_path):
    model, batches = killed_run.set_up()
    with pytest.raises(InterruptedError):
        fit(model, batches, tmp_path, 3, every=3, callbacks=[Stop()], verbose=0)
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True)
    )
    done = fit(
        model, batches, tmp_path, 3, every=3, callbacks=[stop], verbose=0
    )
    assert done.epoch == [0]


@pytest.mark.any_backend
def test_steps_that_are_not_told_are_refused(tmp_path):
    model, batches = killed_run.set_up()
    model.compile(Adam(1e-2), steps_per_execution=2)
    with pytest.raises(ValueError, match="steps_per_execution=2"):
        fit(model, batches, tmp_path, 1, verbose=0)


@pytest.mark.any_backend
def test_a_finished_run_trains_no_more(model_and_batches, tmp_path):
    model, batches = model_and_batches
    first = fit(model, batches, tmp_path, 1, every=3, verbose=0)
    assert first.epoch == [0] and len(first.history["loss"]) == 1
    before = [np.array(variable) for variable in model.trainable_variables]
    again = fit(model, batches, tmp_path, 1, every=3, verbose=0)
    assert again.epoch == [] and again.history == {}
    for variable, two in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), two)


@pytest.mark.any_backend
def test_a_damaged_checkpoint_costs_its_steps_alone(tmp_path):
    def train():
        model, batches = killed_run.set_up()
        fit(model, batches, tmp_path / "run", 1, every=3, verbose=0)
        return [np.array(variable) for variable in model.trainable_variables]

    wanted = train()
    (tmp_path / "run" / "6" / "place" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="step 6 .*goes on after step 5"):
        found = train()
    for value, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(value, other)


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Others have one order of axes."
)
def test_a_run_of_another_order_of_axes_is_refused(model_and_batches, tmp_path):
    """The run is refused even if a kernel is square, so that shapes agree."""
    model, batches = model_and_batches
    model.backbone.unfreeze("*/kernel")
    model.compile("sgd")
    fit(model, batches, tmp_path, 1, every=3, verbose=0)
    for variable in model.trainable_variables:
        variable.outputs_first = 0
    with pytest.raises(ValueError, match="outputs first"):
        fit(model, batches, tmp_path, 2, every=3, verbose=0)


@pytest.mark.any_backend
def test_another_runs_checkpoint_is_refused(model_and_batches, tmp_path):
    model, batches = model_and_batches
    fit(model, batches, tmp_path, 1, every=3, verbose=0)
    model.freeze("*/adapter_b")
    model.compile("sgd")
    with pytest.raises(ValueError, match="is of another run"):
        fit(model, batches, tmp_path, 2, verbose=0)


def test_a_loss_that_is_no_number_stops(model_and_batches, tmp_path):
    model, batches = model_and_batches
    model.trainable_variables[0].assign(
        np.full(model.trainable_variables[0].shape, np.nan)
    )
    with pytest.raises(ValueError, match="The loss is nan after step 1"):
        fit(model, batches, tmp_path, 1, verbose=0)


@pytest.mark.any_backend
def test_weights_that_are_no_numbers_are_not_kept(model_and_batches, tmp_path):
    """The loss of a step is known before its gradient changes weights."""
    model, batches = model_and_batches
    variable = model.trainable_variables[-1]

    def spoil(batch, logs):
        if batch == 4:
            with model.turns:
                variable.assign(np.full(variable.shape, np.inf))

    spoil = keras.callbacks.LambdaCallback(on_train_batch_end=spoil)
    with pytest.raises(ValueError, match="after step 5. .* is of step 3, be"):
        fit(model, batches, tmp_path, 1, every=3, callbacks=[spoil], verbose=0)


@pytest.mark.any_backend
def test_arguments_out_of_range(model_and_batches, tmp_path):
    _, batches = model_and_batches
    with pytest.raises(ValueError, match="every=0"):
        RunCheckpoint(tmp_path, batches, every=0)
    with pytest.raises(ValueError, match="an address, 'gs://bucket/run'"):
        RunCheckpoint("gs://bucket/run", batches)
