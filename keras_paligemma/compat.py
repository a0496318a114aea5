"""The few private names of Keras that the package cannot do without.

Each says why. Whoever updates Keras looks here first.
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

# The base of an iterable that `fit` takes as it is, and begins anew each epoch.
GeneratorDataAdapter: Any = generator_data_adapter.GeneratorDataAdapter


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build layers whose variables have shapes and dtypes but no values.

    A 28b backbone is built in seconds and no memory. `fill` gives variables
    their values, from a file and without a random draw before it.

    `keras.StatelessScope(initialize_variables=False)` makes such variables
    but remembers them in a global list; the next plain scope to close would
    initialise them all, so the list is cleared.

    Example:
        >>> from keras_paligemma import PaliGemmaBackbone
        >>> with without_values():
        ...     backbone = PaliGemmaBackbone()
        >>> backbone.count_params()
        3032094960
    """
    with keras.StatelessScope(initialize_variables=False):
        yield
    global_state.set_global_attribute("uninitialized_variables", [])


def initialize_seeds(layer):
    """Assign the random states of a layer that `without_values` made.

    No file holds them, so `fill` never meets them.
    """
    for variable in layer.variables:
        if variable.path.endswith("seed_generator_state"):
            variable._deferred_initialize()


def fill(variable, value):
    """Assign the first value of a variable that was made without one.

    `Variable.assign` wants a value to replace. Handing the value over as the
    initializer goes through the same door as any new variable, and no random
    value is ever drawn. Where a distribution is active, that door would put
    the whole array on the first device; each shard is cut out on the host and
    cast there instead, one at a time, so that no second whole array exists.
    A variable that has one already is assigned to, and in a stateless scope
    the value is the scope's.

    JAX is given the array as it lies, a transposed view too, and copies and
    casts it by itself: `jnp.asarray`, Keras's way, lets NumPy copy such views
    first, which for bfloat16 is several times slower and a second copy.
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
    """Copy an array to the default device; the smaller dtype travels."""
    import jax

    dtype = jax.numpy.dtype(dtype)
    if dtype.itemsize < value.dtype.itemsize:
        value = value.astype(dtype, copy=False)
    # A copy in any case: JAX cannot donate the memory of a NumPy array, and a
    # training step would hold the weights twice. Done before the next array is
    # read, or several wait in memory.
    array = jax.device_put(value, may_alias=False).astype(dtype)
    return jax.block_until_ready(array)


def _sharded(variable, array):
    """Return an array as its variable is laid out: Keras takes it as it is."""
    import jax  # No other backend has layouts.

    layout = keras.distribution.distribution().get_variable_layout(variable)
    sharding = layout.backend_layout
    # Each is placed before the next is cast. jax.make_array_from_callback
    # would cast all of them first.
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
    """Return the whole array of a variable or tensor, on this process.

    Shards that lie with other processes are gathered, so every process must
    ask, in the same order.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    whole = getattr(value, "is_fully_addressable", True)
    if not (whole or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(keras.ops.convert_to_numpy(value))


def process():
    """Return number and count of this process among those of a run."""
    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def wait_for_all(place):
    """Wait until all processes are at a place, such as behind a file."""
    if process()[1] > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(place)


def least(value):
    """Return the least of an integer that each process has."""
    if process()[1] == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(value)).min())


def rows_to_devices(arrays):
    """Split the rows of a batch over the devices of the distribution.

    Each process gives its own rows. Without a distribution, and where the
    rows do not divide by the devices, the arrays stay as they are, and every
    device computes all of them.

    Args:
        arrays: dict of arrays with the batch as the first axis.

    Returns:
        The arrays, and the slice of the rows that this process gave in what is
        computed of them.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return arrays, slice(None)
    import jax

    placed, rows = {}, slice(None)
    for name, array in arrays.items():
        array = np.asarray(array)
        try:
            # Layouts refuse a batch that does not divide, as JAX does.
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


def never_functional(cls):
    """Keep a subclass of KerasHub's models an ordinary model.

    The first functional model of KerasHub in a process puts Keras's
    `Functional` among the bases of KerasHub's `Backbone` and `Task`, and so
    among those of every class below them. A class with this decorator goes on
    with what `keras.Model` has, whichever model was built first; it starts
    itself by `init_model`.
    """
    for name in {*vars(Functional), *vars(Function)}:
        owners = [one for one in cls.__mro__ if name in vars(one)]
        owners = [one for one in owners if one not in (Functional, Function)]
        if name.startswith("__") or not owners:
            continue
        if owners[0] in keras.Model.__mro__:
            setattr(cls, name, vars(owners[0])[name])
    # What `summary` asks of an instance of `Functional`: a list of layers.
    cls._operations = property(lambda self: self.layers)
    cls._nodes_by_depth = property(lambda self: {})
    return cls


def init_model(model, dtype, **kwargs):
    """Do what KerasHub's classes do at a start, but for `Functional`'s part.

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
        # Declared as `None` for a property that can be set alone.
        return self.fget(owner)  # pyright: ignore[reportOptionalCall]


def add_preset_loader(format, loader):
    """Let `from_preset` of KerasHub's base classes read another format.

    KerasHub chooses a loader by the keys of `config.json` and has no list to
    add to, so the function that chooses is wrapped where each class calls it.

    Args:
        format: str, what `config.json` says under "format".
        loader: class with the methods of KerasHub's `PresetLoader`, made of
            the preset and its config.
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
    """Tell code that asks `platform` that it is compiled for another one.

    JAX compiles for machines that are not there; its default backend does
    not tell.

    Args:
        platform: "tpu", "gpu" or "cpu".
    """
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform():
    """Return the platform that JAX's programs are compiled for, else ""."""
    if keras.backend.backend() != "jax":
        return ""
    import jax

    return _target.get() or jax.default_backend()
