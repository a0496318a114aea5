"""Adapters in a graph: all of them, of which a request names one."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_paligemma.checkpoints.engine import shape_of

BARE = ""


class Switch:
    """The named adapters of a model side by side, in variables of their own.

    A request takes the values of its adapter and assigns nothing, so that
    requests that compute at the same time can have different ones.

    Args:
        adapters: `models.adapters.Adapters`. One that is merged is in the
            kernels, and leaves nothing to switch.
    """

    def __init__(self, adapters):
        known = {} if adapters.merged is not None else adapters.known
        self.names = [BARE, *known]
        self.default = adapters.active if known and adapters.active else BARE
        self._scales = [0.0, *(lora.scale() for lora in known.values())]
        self._slots, self.stacks = {}, {}
        if known:
            self._slots = adapters.slots_by_name(
                "adapter_a", "adapter_b", "adapter_scale"
            )
            held = [adapters.held(name) for name in known]
            # The axis of adapters first, then that of layers.
            self.stacks = {
                slot: tf.Variable(np.stack([one[slot] for one in held]))
                for slot in held[0]
            }

    def is_slot(self, variable):
        """Say whether a variable of the backbone is one that is replaced."""
        return any(
            variable is one
            for slot in self._slots.values()
            for one in (slot if isinstance(slot, list) else [slot])
        )

    def error(self, name):
        """Say what is wrong with a name: a string tensor, "" if nothing is."""
        told = (
            f"`adapter` is unknown. Expected: {', '.join(self.names[1:])}, or "
            "nothing for the bare model. Received: "
        )
        is_known = tf.reduce_any(tf.constant(self.names) == name)
        return tf.where(is_known, "", tf.strings.join([told, name, "."]))

    @contextlib.contextmanager
    def selected(self, name):
        """Have the backbone compute with an adapter; with none if unknown.

        Args:
            name: string tensor, "" for the bare model.
        """
        number = tf.argmax(tf.constant(self.names) == name, output_type="int32")
        scale = tf.gather(tf.constant(self._scales), number)
        # The bare model is the first adapter times zero.
        number = tf.maximum(number - 1, 0)
        values = []
        for slot, variables in self._slots.items():
            if slot in self.stacks:
                value = tf.gather(self.stacks[slot], number)
            else:
                value = tf.fill(shape_of(variables), scale)
            if isinstance(variables, list):
                values += zip(variables, tf.unstack(value), strict=True)
            else:
                values.append((variables, value))
        with keras.StatelessScope(values):
            yield
