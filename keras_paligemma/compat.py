"""The few private names of Keras and KerasHub that are used, with the reasons.

Check this file first when either is updated.
"""

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.models.functional import Functional
from keras.src.ops.function import Function
from keras.src.trainers.data_adapters import generator_data_adapter

# What JAX's trainer takes from a model's variables, in the order in which its
# `_get_jax_state` returns it, and the names of `_jax_state`.
JAX_STATE = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)


def optimizer_targets(optimizer: Any) -> list[Any]:
    """Return the variables that an optimizer was built for."""
    return optimizer._trainable_variables


def sentence_piece_processor(tokenizer: Any) -> Any:
    """Return the `SentencePieceProcessor` of a KerasHub tokenizer.

    The tokenizer's methods always give it a list, for which it starts threads.
    """
    tokenizer._check_vocabulary()
    tokenizer._maybe_initialized_spm()
    return tokenizer._sentence_piece_spm


# Base class of iterables that `fit` restarts each epoch.
GeneratorDataAdapter: Any = generator_data_adapter.GeneratorDataAdapter


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build layers whose variables have shapes and dtypes but no values.

    A 28b backbone is built in seconds, without memory for its weights. `fill`
    then assigns values, for example from a file, without a previous random
    initialisation.

    `keras.StatelessScope(initialize_variables=False)` creates such variables
    but adds them to a global list; the next plain scope that closes would
    initialise them all, so the list is cleared, also after an error.

    Example:
        >>> from keras_paligemma import PaliGemmaBackbone
        >>> with without_values():
        ...     backbone = PaliGemmaBackbone()
        >>> backbone.count_params()
        3032094960
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute("uninitialized_variables", [])


def initialize_seeds(layer):
    """Initialise the random states of a layer built in `without_values`.

    No file stores them, so `fill` does not assign them.
    """
    for variable in layer.variables:
        if variable.path.endswith("seed_generator_state"):
            variable._deferred_initialize()


def fill(variable, value):
    """Assign the first value of a variable created without one.

    `Variable.assign` needs an existing value, so the value is passed as the
    initializer, and no random value is drawn. Under a distribution an
    initializer would place the whole array on the first device. So each shard
    is sliced and cast on the host, one at a time, without a second whole
    array. A variable that has a value is assigned as usual, and in a stateless
    scope the scope takes the value.

    JAX receives the array itself, even a transposed view, and copies and casts
    it. Keras uses `jnp.asarray`, which makes NumPy copy such views first: for
    bfloat16 this is several times slower, and a second copy.
    """
    if in_stateless_scope() or variable._value is not None:
        variable.assign(value)
        return
    if keras.distribution.distribution() is not None:
        variable._initialize(_sharded(variable, np.asarray(value)))
        variable._initializer = None
        return
    place = variable._convert_to_tensor
    if keras.backend.backend() == "jax":
        place = _place_by_jax
    variable._initializer = lambda shape, dtype=None: place(value, dtype=dtype)
    variable._deferred_initialize()


def _place_by_jax(value, dtype):
    """Copy an array to the default device, in the smaller of both dtypes."""
    import jax

    dtype = jax.numpy.dtype(dtype)
    if dtype.itemsize < value.dtype.itemsize:
        value = value.astype(dtype, copy=False)
    # Always a copy: JAX cannot donate the memory of a NumPy array, and a
    # training step would hold the weights twice. Blocks, so that only one
    # array at a time is in host memory.
    array = jax.device_put(value, may_alias=False).astype(dtype)
    return jax.block_until_ready(array)


def _sharded(variable, array):
    """Return an array sharded by its variable's layout."""
    import jax  # No other backend has layouts.

    layout = keras.distribution.distribution().get_variable_layout(variable)
    sharding = layout.backend_layout
    # Each shard is placed before the next is cast;
    # `jax.make_array_from_callback` would cast all of them first.
    shards = [
        jax.block_until_ready(
            jax.device_put(
                array[index].astype(variable.dtype, copy=False),
                device,
                may_alias=False,
            )
        )
        for device, index in sharding.addressable_devices_indices_map(
            array.shape
        ).items()
    ]
    return jax.make_array_from_single_device_arrays(
        array.shape, sharding, shards
    )


def to_host(value):
    """Return the whole value of a variable or tensor as a NumPy array.

    Shards of other processes are gathered, so every process must call it, in
    the same order.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    whole = getattr(value, "is_fully_addressable", True)
    if not (whole or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(keras.ops.convert_to_numpy(value))


def process():
    """Return the index of this process and the number of processes."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def wait_for_all(place):
    """Wait until all processes reach the barrier named `place`."""
    if process()[1] > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


def least(value):
    """Return the minimum of an integer over all processes."""
    if process()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(value)).min())


def rows_to_devices(arrays):
    """Split the rows of a batch over the devices of the distribution.

    Each process passes its own rows. Without a distribution, or if the number
    of rows is not divisible by that of devices, the arrays are returned
    unchanged, and every device computes all rows.

    Args:
        arrays: dict of arrays with the batch as the first axis.

    Returns:
        The dict of placed arrays, and the slice of this process's rows in the
        results.

    Raises:
        ValueError: processes pass different numbers of rows.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return arrays, slice(None)
    import jax

    count = len(next(iter(arrays.values())))
    if least(count) != -least(-count):
        raise ValueError(
            "Hosts compute a batch together, so each has as many rows. "
            f"Received: {count} rows on this host, and another number on "
            "others. Expected: equal numbers, such as by repeating the last "
            "prompt."
        )
    placed, rows = {}, slice(None)
    for name, array in arrays.items():
        array = np.asarray(array)
        try:
            # Raises if the batch is not divisible.
            layout = distribution.get_data_layout(array.shape).backend_layout
            whole = jax.make_array_from_process_local_data(layout, array)
            layout.shard_shape(whole.shape)
        except ValueError:
            if process()[1] > 1:
                raise
            return arrays, slice(None)
        placed[name] = whole
        here = layout.addressable_devices_indices_map(whole.shape).values()
        first = min(index[0].start or 0 for index in here)
        rows = slice(first, first + len(array))
    return placed, rows


def replicas():
    """Return the number of parts that the distribution splits a batch into."""
    distribution = keras.distribution.distribution()
    return 1 if distribution is None else distribution.num_model_replicas


def never_functional(cls):
    """Decorate a subclass of KerasHub's models to stay a subclassed model.

    The first functional model of KerasHub in a process inserts Keras's
    `Functional` into the bases of KerasHub's `Backbone` and `Task`, and so of
    all their subclasses. A decorated class always keeps the methods of
    `keras.Model`; its `__init__` calls `init_model`.
    """
    for name in {*vars(Functional), *vars(Function)}:
        owners = [base for base in cls.__mro__ if name in vars(base)]
        owners = [base for base in owners if base not in (Functional, Function)]
        if name.startswith("__") or not owners:
            continue
        if owners[0] in keras.Model.__mro__:
            setattr(cls, name, vars(owners[0])[name])
    # `summary` reads these attributes of an instance of `Functional`.
    cls._operations = property(lambda self: self.layers)
    cls._nodes_by_depth = property(lambda self: {})
    return cls


def init_model(model, dtype, **kwargs):
    """Initialise a model as KerasHub's classes do, without `Functional`.

    Args:
        model: instance of a `never_functional` class, in its `__init__`.
        dtype: dtype policy or its name.
        **kwargs: as `keras.Model` takes them.
    """
    keras.Model.__init__(model, **kwargs)
    model._functional_layer_ids = set()
    model._initialized = True
    model.dtype_policy = keras.dtype_policies.get(dtype)


class classproperty(property):
    """A property of the class itself, as KerasHub's `presets` are."""

    def __get__(self, instance, owner):
        # Declared as possibly `None`, for properties without a getter.
        return self.fget(owner)  # pyright: ignore[reportOptionalCall]


def add_preset_loader(format, loader):
    """Add a preset format to `from_preset` of KerasHub's base classes.

    KerasHub chooses a loader by the keys of `config.json` and has no registry
    of loaders, so its choosing function is wrapped in each calling module.

    Args:
        format: str, the value of "format" in `config.json`.
        loader: class with the methods of KerasHub's `PresetLoader`, called
            with the preset and its config.
    """
    import keras_hub
    from keras_hub.src.utils import preset_utils

    choose = preset_utils.get_preset_loader

    def get_preset_loader(preset):
        if preset_utils.check_file_exists(preset, preset_utils.CONFIG_FILE):
            config = preset_utils.load_json(preset)
            if isinstance(config, dict) and config.get("format") == format:
                return loader(preset, config)
        return choose(preset)

    for base in (
        keras_hub.layers.ImageConverter,
        keras_hub.models.Backbone,
        keras_hub.models.Preprocessor,
        keras_hub.models.Task,
        keras_hub.tokenizers.Tokenizer,
    ):
        vars(sys.modules[base.__module__])[get_preset_loader.__name__] = (
            get_preset_loader
        )


_target = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(platform):
    """Set the result of `platform` for ahead-of-time compilation.

    JAX can compile for machines that are not attached, which its default
    backend does not reflect.

    Args:
        platform: str, "tpu", "gpu" or "cpu".
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform():
    """Return the platform that JAX compiles for; "" on other backends."""
    if keras.backend.backend() != "jax":
        return ""
    import jax

    return _target.get() or jax.default_backend()


def compiles_here():
    """Return whether programs are compiled for this machine."""
    return _target.get() is None
