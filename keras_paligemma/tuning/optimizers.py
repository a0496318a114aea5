"""Adam for weights of every dtype, and the original's training recipe."""

import fnmatch
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import optimizer_targets
from keras_paligemma.compat import platform
from keras_paligemma.compat import to_host
from keras_paligemma.layers.remat import after
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.layers.weight import as_variable
from keras_paligemma.layers.weight import inputs_first
from keras_paligemma.types import Config
from keras_paligemma.types import Tensor

# Weights that the original decays. It decays none of the text decoder, since
# its pattern does not match the names of those parameters.
DECAYED = ("vision_encoder/*kernel",)
# Attributes of Keras's optimizers: the share of a moment that a step keeps.
MOMENT_RATES = (
    *("beta_1", "beta_2", "rho", "momentum"),
    *("adam_beta_1", "adam_beta_2"),
)


class AdamStep(NamedTuple):
    """Scalars that all weights share in one step, in float32.

    Args:
        learning_rate: tensor ().
        number: tensor (), 1 for the first step.
        mean_correction: tensor (), 1 - beta_1 to the power of `number`.
        square_correction: tensor (), 1 - beta_2 to the power of `number`.
    """

    learning_rate: Tensor
    number: Tensor
    mean_correction: Tensor
    square_correction: Tensor


@keras.saving.register_keras_serializable(package="keras_paligemma")
class Adam(keras.optimizers.Adam):
    """Keras's Adam with float32 moments and learning rates by pattern.

    In bfloat16, 0.999 rounds to 1 and the second moment never changes; here
    moments, updates and averages are computed in float32, whatever the weight's
    dtype.

    Args:
        learning_rate: float, or schedule.
        multipliers: dict of pattern to float, a factor of the learning rate
            and of the weight decay for weights whose name matches the pattern
            ("vision_encoder/*": 0.1); the first match counts.
        decayed: pattern or patterns of the weights that are decayed; `None`
            for all.
        epsilon: float, added to the denominator.
        **kwargs: as `keras.optimizers.Adam` takes them, without `amsgrad`:
            `beta_2`, `weight_decay`, `global_clipnorm`, `use_ema`,
            `gradient_accumulation_steps`, …

    Raises:
        ValueError: `amsgrad`; or when it is built, a pattern that matches no
            trained weight, other than those of `DECAYED`.

    Source: https://arxiv.org/abs/1412.6980.
    """

    def __init__(
        self,
        learning_rate: Any = 2e-5,
        multipliers: Any = None,
        decayed: Any = None,
        epsilon: float = 1e-8,
        name: str = "adam",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("amsgrad"):
            raise ValueError(
                "This Adam keeps no maximum of its moments. Received: "
                "amsgrad=True. Expected: False, or `keras.optimizers.Adam`."
            )
        super().__init__(learning_rate, epsilon=epsilon, name=name, **kwargs)
        self.multipliers = dict(multipliers or {})
        if isinstance(decayed, str):
            decayed = (decayed,)
        self.decayed = decayed and tuple(decayed)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        names = [stable_name(variable.path) for variable in variables]
        # The original's recipe also trains adapters, without decay.
        decayed = {*(self.decayed or ())} - {*DECAYED}
        for pattern in (*self.multipliers, *sorted(decayed)):
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    "No trained weight matches a pattern of `multipliers` or "
                    f"`decayed`. Received: {pattern!r}. Expected: a pattern of "
                    f"names such as {names[0]!r}."
                )
        super().build(variables)
        # By index: TensorFlow passes its own variables, which have no path.
        self._rates = [self._rate(name) for name in names]
        self._is_decayed = [
            self.decayed is None
            or any(fnmatch.fnmatch(name, pattern) for pattern in self.decayed)
            for name in names
        ]

    def _rate(self, name):
        for pattern, factor in self.multipliers.items():
            if fnmatch.fnmatch(name, pattern):
                return factor
        return 1.0

    def add_variable(self, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        is_other = dtype in ("bfloat16", "float16", "float64")
        dtype = "float32" if is_other else dtype
        return super().add_variable(*args, dtype=dtype, **kwargs)

    def add_variable_from_reference(
        self, reference_variable: keras.Variable, *args: Any, **kwargs: Any
    ) -> Any:
        moment = super().add_variable_from_reference(
            reference_variable, *args, **kwargs
        )
        # Its axes have the weight's order.
        moment.weight = reference_variable
        return moment

    def save_own_variables(self, store: Any) -> None:
        for number, variable in enumerate(self.variables):
            array = to_host(variable)
            store[str(number)] = inputs_first(array, *_order(variable))

    def load_own_variables(self, store: Any) -> None:
        if len(store.keys()) != len(self.variables):
            super().load_own_variables(store)  # Which warns.
            return
        for number, variable in enumerate(self.variables):
            array = np.asarray(store[str(number)])
            variable.assign(as_variable(array, *_order(variable)))

    def apply(
        self,
        grads: Sequence[Tensor],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> Any:
        if self.gradient_accumulation_steps:
            # The accumulators are float32, and JAX needs the same dtype.
            grads = [
                gradient if gradient is None else ops.cast(gradient, "float32")
                for gradient in grads
            ]
        return super().apply(grads, trainable_variables)

    def _update_model_variables_moving_average(self, trainable_variables):
        # As Keras does, but in float32: in bfloat16 a momentum of 0.999 rounds
        # to 1, and the average would remain that of the first step.
        is_later = ops.cast(ops.not_equal(self.iterations, 0), "float32")
        momentum = is_later * self.ema_momentum
        averages = self._model_variables_moving_average
        for variable, average in zip(
            trainable_variables, averages, strict=True
        ):
            value = ops.cast(variable, "float32")
            average.assign(momentum * average + (1 - momentum) * value)

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables
    ):
        averages = self._model_variables_moving_average
        for variable in trainable_variables:
            # By index: some weights may have been frozen since the build.
            average = averages[self._get_variable_index(variable)]
            # TensorFlow does not convert the float32 average. Copies: in the
            # next `fit`, JAX cannot donate the same array both as the weight
            # and as its average.
            variable.assign(ops.copy(ops.cast(average, variable.dtype)))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # Once, not per weight: an update is 23 operations on TensorFlow, not
        # 39.
        number = ops.cast(self.iterations + 1, "float32")
        step = AdamStep(
            ops.cast(learning_rate, "float32"),
            number,
            1 - ops.power(self.beta_1, number),
            1 - ops.power(self.beta_2, number),
        )
        super()._backend_update_step(grads, trainable_variables, step)

    def update_step(
        self,
        gradient: Tensor,
        variable: keras.Variable,
        learning_rate: AdamStep,
    ) -> None:
        step = learning_rate
        if platform() == "tpu":
            # Cast when it is used: otherwise a TPU casts all gradients to
            # float32 at once, 0.23 GiB for 3b on eight chips.
            (gradient,) = after(step.number, gradient)
        gradient = ops.cast(gradient, "float32")
        index = self._get_variable_index(variable)
        rate = step.learning_rate
        if self._rates[index] != 1:
            rate = rate * self._rates[index]
        momentum, velocity = self._momentums[index], self._velocities[index]
        self.assign_add(momentum, (gradient - momentum) * (1 - self.beta_1))
        self.assign_add(
            velocity, (ops.square(gradient) - velocity) * (1 - self.beta_2)
        )
        # As in the paper and the original. Keras does not correct the bias of
        # the term with epsilon, which slows small gradients at the start.
        mean = momentum / step.mean_correction
        square = velocity / step.square_correction
        change = rate * mean / (ops.sqrt(square) + self.epsilon)
        self.assign_sub(variable, ops.cast(change, variable.dtype))

    def _apply_weight_decay(self, variables):
        if self.weight_decay is None:
            return
        rate = self.weight_decay * self._get_current_learning_rate()
        for variable in variables:
            index = self._get_variable_index(variable)
            if self._is_decayed[index] and self._use_weight_decay(variable):
                share = ops.cast(rate * self._rates[index], "float32")
                change = ops.cast(variable, "float32") * share
                self.assign_sub(variable, ops.cast(change, variable.dtype))

    def get_config(self) -> Config:
        return super().get_config() | {
            "multipliers": self.multipliers,
            "decayed": self.decayed,
        }


def _order(variable):
    """Return the weight of a moment, and its number of layer axes."""
    weight = getattr(variable, "weight", variable)
    return weight, getattr(weight, "layer_axes", 0)


def transfer_recipe(
    steps: int,
    learning_rate: float = 1e-5,
    weight_decay: float | None = 0.0,
    warmup: Any = 0.05,
    clip: float | None = 1.0,
    **kwargs: Any,
) -> Adam:
    """Return the optimizer of the original's transfers.

    Adam with a global gradient norm, a linear warm-up and cosine decay to
    zero. The published settings of each benchmark are pairs of learning rate
    and weight decay for batches of 256.

    Args:
        steps: int, total number of training steps.
        learning_rate: float, at the end of the warm-up.
        weight_decay: float, fraction of a weight that is subtracted in a step
            at the full learning rate, not multiplied by it. Applies to
            `DECAYED`.
        warmup: float, fraction of the steps.
        clip: float, maximum global norm of the gradients.
        **kwargs: as in `Adam`.

    Returns:
        `Adam`.

    Example:
        >>> transfer_recipe(1000, 3e-6, weight_decay=3e-7).global_clipnorm
        1.0

    Source: big_vision, `configs/proj/paligemma/transfers`.
    """
    warmup_steps = int(warmup * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else learning_rate,
        steps - warmup_steps,
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    # Keras multiplies the decay by the learning rate.
    decay = weight_decay / learning_rate if weight_decay else None
    return Adam(
        schedule,
        weight_decay=decay,
        decayed=DECAYED,
        global_clipnorm=clip,
        **kwargs,
    )


def check_built_for(optimizer, variables):
    """Raise if an optimizer was built for other weights than are trained.

    On JAX a step takes exactly the optimizer's weights. On other backends the
    weights may also be some of them.

    Args:
        optimizer: Keras optimizer, or `None`.
        variables: list of the trained variables.

    Raises:
        ValueError: says how many weights there are, and what to do.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if optimizer is None or not optimizer.built:
        return
    built_for = [id(v) for v in optimizer_targets(optimizer)]
    trained = [id(v) for v in variables]
    if keras.backend.backend() == "jax":
        known = built_for == trained
    else:
        known = set(trained) <= set(built_for)
    if not known:
        raise ValueError(
            "The optimizer was built for other weights than are trained now. "
            f"Received: an optimizer of {len(built_for)} weights, and "
            f"{len(trained)} trained ones. Call `compile` again after "
            "`enable_lora`, `load_adapter`, `freeze` or `unfreeze`."
        )


def check_moments(optimizer, variables):
    """Raise `ValueError` if an optimizer's moments would never change.

    Args:
        optimizer: Keras optimizer.
        variables: list of the trained variables.

    Raises:
        ValueError: a beta rounds to 1 in a variable's dtype.
    """
    if optimizer is None or isinstance(optimizer, Adam):
        return
    for variable in variables:
        if variable.dtype not in ("bfloat16", "float16"):
            continue
        rates = MOMENT_RATES + ("ema_momentum",) * optimizer.use_ema
        for name in rates:
            beta = getattr(optimizer, name, None)
            if not isinstance(beta, float) or beta >= 1:
                continue
            rounded = float(
                ops.convert_to_numpy(
                    ops.cast(ops.cast(beta, variable.dtype), "float32")
                )
            )
            if rounded == 1:
                raise ValueError(
                    f"{name}={beta} is 1 in {variable.dtype}, the dtype of the "
                    f"trained {variable.path}: nothing would ever move. Use "
                    "keras_paligemma.Adam, whose moments are float32; load the "
                    "model with dtype='mixed_bfloat16', whose weights are "
                    "float32; or train adapters, which are float32."
                )
