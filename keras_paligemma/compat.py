"""The few private names of Keras that the package cannot do without.

Each says why. Whoever updates Keras looks here first.
"""

from keras.src.backend.common import global_state


def forget_uninitialized_variables():
    """Clear Keras's list of variables that were made without values.

    `keras.StatelessScope(initialize_variables=False)` makes such variables
    and remembers them in a global list; the next plain scope to close would
    then initialise the whole abstract model.
    """
    global_state.set_global_attribute("uninitialized_variables", [])


def fill(variable, value):
    """Give a variable that was made without a value its first one.

    `Variable.assign` wants a value to replace. Handing the value over as the
    initializer goes through the same door as any new variable: it is cast and
    placed on its shards, and no random value is ever drawn.
    """
    if variable._value is not None:
        variable.assign(value)
        return
    variable._initializer = lambda shape, dtype=None: (
        variable._convert_to_tensor(value, dtype=dtype)
    )
    variable._deferred_initialize()


class classproperty(property):
    """A property of the class itself, as KerasHub's `presets` are."""

    def __get__(self, instance, owner):
        return self.fget(owner)
