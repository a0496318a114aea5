"""Stand-ins for a model's weights in a graph, with a choice of adapters."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

BARE = ""
# Key of a variable in a SavedModel's files: list of the root, index.
KEY = "{}/{}/.ATTRIBUTES/VARIABLE_VALUE"


class Weights:
    """Variables that a graph reads in place of a model's.

    They are empty TensorFlow variables, and the model's own may lack values
    too: values are written to the files one by one, see `export.checkpoint`.

    The named adapters are stacked. A request gathers the values of its adapter
    and assigns nothing, so concurrent requests can use different adapters. A
    merged adapter is part of the kernels and cannot be switched.

    Args:
        backbone: `PaliGemmaBackbone` of the TensorFlow backend.
    """

    def __init__(self, backbone):
        self._adapters = backbone.adapters
        is_merged = self._adapters.merged is not None
        self._configs = {} if is_merged else self._adapters.configs
        self.names = [BARE, *self._configs]
        self.default = BARE
        self._adapter_weights = {}
        if self._configs:
            self.default = self._adapters.active or BARE
            self._adapter_weights = self._adapters.variables.weights(
                *self._adapters.capacity.pieces, "adapter_scale"
            )
        self._base = [
            variable
            for name, weight in backbone.weights_by_name().items()
            if name not in self._adapter_weights
            for variable in weight.variables
        ]
        self._pieces = [
            name for name in self._adapter_weights if "scale" not in name
        ]
        self.base = [
            _empty(variable.shape, variable.dtype) for variable in self._base
        ]
        # The axis of adapters comes first, then that of layers.
        self.adapters = [
            _empty(
                (len(self._configs), *self._adapter_weights[piece].shape),
                "float32",
            )
            for piece in self._pieces
        ]

    def values(self, base):
        """Iterate over all values with their keys in a SavedModel's files.

        Args:
            base: iterable of pairs of a variable of the model and its value.

        Yields:
            Pairs of key and value.
        """
        number = {
            id(variable): place for place, variable in enumerate(self._base)
        }
        for variable, value in base:
            if id(variable) in number:
                yield KEY.format("weights", number[id(variable)]), value
            del value  # Before the next one is read.
        adapters = [self._adapters.pieces(name) for name in self._configs]
        for place, piece in enumerate(self._pieces):
            value = np.stack([arrays[piece] for arrays in adapters])
            yield KEY.format("adapters", place), value

    def error(self, name):
        """Return an error for an unknown adapter, or "": a string tensor."""
        message = (
            f"`adapter` is unknown. Expected: {', '.join(self.names[1:])}, or "
            "nothing for the bare model. Received: "
        )
        is_known = tf.reduce_any(tf.constant(self.names) == name)
        return tf.where(is_known, "", tf.strings.join([message, name, "."]))

    @contextlib.contextmanager
    def selected(self, name):
        """Let the backbone use these variables and an adapter in this context.

        Args:
            name: string tensor, name of an adapter; "" or an unknown name for
                the bare model.
        """
        values = [
            (variable, tf.ensure_shape(value, variable.shape))
            for variable, value in zip(self._base, self.base, strict=True)
        ]
        number = tf.argmax(tf.constant(self.names) == name, output_type="int32")
        scales = self._scales(number)
        # The bare model is the first adapter times zero.
        number = tf.maximum(number - 1, 0)
        stacks = dict(zip(self._pieces, self.adapters, strict=True))
        for key, weight in self._adapter_weights.items():
            if key in stacks:
                value = tf.gather(stacks[key], number)
                value = tf.ensure_shape(value, weight.shape)
            else:
                value = scales[key]
            unrolled = weight.form == "unrolled"
            parts = tf.unstack(value) if unrolled else [value]
            values += zip(weight.variables, parts, strict=True)
        with keras.StatelessScope(values):
            yield

    def _scales(self, number):
        """Return the scales of an adapter by name; 0 is the bare model."""
        if not self._configs:
            return {}
        each = [self._adapters.scales(name) for name in (None, *self._configs)]
        return {
            name: tf.gather(
                np.stack([scales[name] for scales in each]).astype("float32"),
                number,
            )
            for name in each[0]
        }


def _empty(shape, dtype):
    """Return an empty variable of a rank; a scalar has one value."""
    return tf.Variable(
        tf.zeros([0] * len(shape), dtype), shape=[None] * len(shape)
    )
