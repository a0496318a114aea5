"""`compile`: optimizer, loss, metrics, sampler; also from a `.keras` file."""

from typing import Any

import keras
import keras_hub
from keras import ops

from keras_paligemma.generation.requests import check_sampler
from keras_paligemma.tuning.losses import StreamedCrossEntropy
from keras_paligemma.tuning.optimizers import Adam
from keras_paligemma.turns import alone
from keras_paligemma.types import Config


@alone
def compile(
    self,
    optimizer: Any = "auto",
    loss: Any = "auto",
    *,
    metrics: Any = None,
    weighted_metrics: Any = "auto",
    sampler: Any = "greedy",
    **kwargs: Any,
) -> None:
    """Configure optimizer, loss, metrics and sampler.

    Args:
        optimizer: Keras optimizer or "auto": our `Adam` at 2e-5.
        loss: "auto", which is `StreamedCrossEntropy()`; an instance of it;
            or any Keras loss of (B, R) targets and (B, R, V) logits.
            `StreamedCrossEntropy` adds the metric `token_accuracy`, also
            logged under KerasHub's name, `sparse_categorical_accuracy`.
        metrics: Keras metrics, unweighted: they include padding.
        weighted_metrics: Keras metrics of the response tokens; "auto" adds
            none to those of `loss`.
        sampler: name or `keras_hub.samplers.Sampler` for `generate`.
        **kwargs: as `keras.Model.compile` takes them.
    """
    sampler = check_sampler(sampler, self.backbone.vocabulary_size)
    if optimizer == "auto":
        optimizer = Adam(2e-5)
    loss = StreamedCrossEntropy() if loss == "auto" else loss
    if isinstance(weighted_metrics, str) and weighted_metrics == "auto":
        weighted_metrics = None
    # Metrics on logits materialise them anyway: streaming saves nothing.
    is_own = isinstance(loss, StreamedCrossEntropy)
    if is_own and kwargs.get("loss_weights") is not None:
        raise ValueError(
            "`StreamedCrossEntropy` is the only loss. Received: "
            f"loss_weights={kwargs['loss_weights']!r}. Expected: another "
            "learning rate, or `sample_weight` in `fit`."
        )
    self.own_loss = loss if is_own else None
    self.streams = is_own and not (metrics or weighted_metrics)
    if optimizer is not getattr(self, "optimizer", None):
        self.trained_adapter = None
    keras.Model.compile(
        self,
        optimizer=optimizer,
        loss=None if is_own else loss,
        metrics=metrics,
        weighted_metrics=weighted_metrics,
        **kwargs,
    )
    if metrics or weighted_metrics:
        _build_metrics(self)
    self.sampler = sampler
    self.generate_function = None


def _build_metrics(model):
    """Build the variables of the metrics.

    Keras would do so in the first step, on TensorFlow inside a graph, and
    from the output of `call`: hidden states, while metrics take logits.
    """
    shape = (1, 2, model.backbone.vocabulary_size)
    keras.Model.compute_metrics(
        model,
        None,
        ops.zeros(shape[:2], "int32"),
        ops.zeros(shape, "float32"),
        ops.ones(shape[:2], "float32"),
    )
    model.reset_metrics()


def get_compile_config(self) -> Config | None:
    """Return the compile arguments that a `.keras` file stores."""
    config = keras.Model.get_compile_config(self)
    if self.own_loss is not None:
        config["loss"] = keras.saving.serialize_keras_object(self.own_loss)
    return config | {
        "sampler": keras_hub.samplers.serialize(self.sampler),
        "optimizer_built": self.optimizer.built,
        # The optimizer's variables are those of these weights.
        "trained": [
            name
            for name, weight in self.backbone.weights_by_name().items()
            if weight.trainable
        ],
    }


def compile_from_config(self, config: Config) -> None:
    """Compile with the arguments stored in a `.keras` file."""
    config = dict(config)
    optimizer_built = config.pop("optimizer_built")
    sampler = keras_hub.samplers.deserialize(config.pop("sampler"))
    trained = config.pop("trained", None)
    if trained is not None:  # Files of earlier versions do not tell.
        for name, weight in self.backbone.weights_by_name().items():
            weight.set_trainable(name in trained)
    config = keras.saving.deserialize_keras_object(config)
    self.compile(**config, sampler=sampler)
    if optimizer_built:
        self.optimizer.build(self.trainable_variables)
