"""The few private names of Keras that the package cannot do without.

Each says why. Whoever updates Keras looks here first.
"""

import contextlib

import keras
import numpy as np
from keras.src.backend.common import global_state


@contextlib.contextmanager
def without_values():
    """Build layers whose variables have shapes and dtypes but no values.

    A 28b backbone is built in seconds and no memory. `fill` gives variables
    their values, from a file and without a random draw before it.

    `keras.StatelessScope(initialize_variables=False)` makes such variables
    but remembers them in a global list; the next plain scope to close would
    initialise them all, so the list is cleared.

    Example:
        >>> with without_values():
        ...     backbone = PaliGemmaBackbone()
        >>> backbone.count_params()
        3032094960
    """
    with keras.StatelessScope(initialize_variables=False):
        yield
    global_state.set_global_attribute("uninitialized_variables", [])


def fill(variable, value):
    """Give a variable that was made without a value its first one.

    `Variable.assign` wants a value to replace. Handing the value over as the
    initializer goes through the same door as any new variable, and no random
    value is ever drawn. Where a distribution is active, that door would put
    the whole array on the first device; the array is cast on the host instead,
    and each device gets its shard of it.
    """
    if variable._value is not None:
        variable.assign(value)
        return
    if keras.distribution.distribution() is not None:
        variable._initialize(
            np.asarray(value).astype(variable.dtype, copy=False)
        )
        variable._initializer = None
        return
    variable._initializer = lambda shape, dtype=None: (
        variable._convert_to_tensor(value, dtype=dtype)
    )
    variable._deferred_initialize()


class classproperty(property):
    """A property of the class itself, as KerasHub's `presets` are."""

    def __get__(self, instance, owner):
        return self.fget(owner)
