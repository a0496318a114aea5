"""A model's weights in a graph, empty ones; and the switch of adapters."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_paligemma.checkpoints.engine import shape_of

BARE = ""
# A variable in the files of a SavedModel, whose root has two lists of them.
KEY = "{}/{}/.ATTRIBUTES/VARIABLE_VALUE"


class Weights:
    """What a graph reads in place of the variables of a model.

    Variables of TensorFlow of no size stand for the model's, which may have no
    values either: those go to the files one by one, see `export.checkpoint`.

    The named adapters lie side by side. A request takes the values of its own
    and assigns nothing, so that requests that compute at the same time can
    have different ones. One that is merged is in the kernels, and leaves
    nothing to switch.

    Args:
        backbone: `PaliGemmaBackbone` of the TensorFlow backend.
    """

    def __init__(self, backbone):
        self._adapters = backbone.adapters
        is_merged = self._adapters.merged is not None
        self._known = {} if is_merged else self._adapters.known
        self.names = [BARE, *self._known]
        self.default = BARE
        self._slots = {}
        if self._known:
            self.default = self._adapters.active or BARE
            self._slots = self._adapters.slots_by_name(
                *self._adapters.slots.pieces, "adapter_scale"
            )
        self._base = [
            variable
            for name, weight in backbone.weights_by_name().items()
            if name not in self._slots
            for variable in _layers(weight)
        ]
        self._pieces = [slot for slot in self._slots if "scale" not in slot]
        self.base = [
            _empty(variable.shape, variable.dtype) for variable in self._base
        ]
        # The axis of adapters first, then that of layers.
        self.adapters = [
            _empty((len(self._known), *shape_of(self._slots[piece])), "float32")
            for piece in self._pieces
        ]

    def values(self, base):
        """Give all values by their keys in the files of a SavedModel.

        Args:
            base: iterable of pairs of a variable of the model and its value.
        """
        number = {id(one): place for place, one in enumerate(self._base)}
        for variable, value in base:
            if id(variable) in number:
                yield KEY.format("weights", number[id(variable)]), value
            del value  # Before the next one is read.
        held = [self._adapters.pieces(name) for name in self._known]
        for place, piece in enumerate(self._pieces):
            value = np.stack([values[piece] for values in held])
            yield KEY.format("adapters", place), value

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
        """Have the backbone compute with these, and with an adapter.

        Args:
            name: string tensor, "" for the bare model, as is an unknown one.
        """
        values = [
            (variable, tf.ensure_shape(one, variable.shape))
            for variable, one in zip(self._base, self.base, strict=True)
        ]
        number = tf.argmax(tf.constant(self.names) == name, output_type="int32")
        scales = self._scales(number)
        # The bare model is the first adapter times zero.
        number = tf.maximum(number - 1, 0)
        stacks = dict(zip(self._pieces, self.adapters, strict=True))
        for slot, weight in self._slots.items():
            shape = shape_of(weight)
            if slot in stacks:
                value = tf.ensure_shape(tf.gather(stacks[slot], number), shape)
            else:
                value = scales[slot]
            parts = tf.unstack(value) if isinstance(weight, list) else [value]
            values += zip(_layers(weight), parts, strict=True)
        with keras.StatelessScope(values):
            yield

    def _scales(self, number):
        """Map slots to the scales of an adapter; number 0 is the bare model."""
        if not self._known:
            return {}
        each = [self._adapters.scales(name) for name in (None, *self._known)]
        return {
            slot: tf.gather(
                np.stack([scales[slot] for scales in each]).astype("float32"),
                number,
            )
            for slot in each[0]
        }


def _layers(weight):
    return weight if isinstance(weight, list) else [weight]


def _empty(shape, dtype):
    """Make a variable of a rank that has no values yet; a scalar has one."""
    return tf.Variable(
        tf.zeros([0] * len(shape), dtype), shape=[None] * len(shape)
    )
