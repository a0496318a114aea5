"""Weights of few bits as the float arrays that checkpoints know.

A checkpoint of floats holds a kernel; a quantised model holds integers and
scales. Seen through these views, the second is loaded from the first by the
same engine and rows, quantised tensor by tensor as it is read.
"""

import numpy as np

from keras_paligemma.compat import fill
from keras_paligemma.compat import to_host


def dequantized_views(weights):
    """Give a model's weights as a checkpoint of floats knows them.

    Args:
        weights: dict of stable name to variable or list of variables.

    Returns:
        The same dict without scales; quantised weights are
        `DequantizedView`s, of blocks a list of one a layer, in both forms of
        repetition.
    """
    views = {}
    for name, weight in weights.items():
        scale = weights.get(f"{name}_scale")
        if scale is not None:
            views[name] = _views(weight, scale)
        elif name.removesuffix("_scale") not in weights.keys() - {name}:
            views[name] = weight
    return views


def _views(stored, scale):
    if isinstance(stored, list):
        return [
            DequantizedView(*pair) for pair in zip(stored, scale, strict=True)
        ]
    if len(stored.shape) == len(stored.quantized_format.shape):
        return DequantizedView(stored, scale)
    stage = _Stage((stored, scale))
    return [
        DequantizedView(stored, scale, layer, stage)
        for layer in range(stored.shape[0])
    ]


class DequantizedView:
    """A weight of few bits as the float array that it stands for.

    It has what the engine asks of a weight: a shape, and `assign`, which
    quantises.

    Args:
        stored: int8 variable that has a `quantized_format`, see
            `quantization.storage`.
        scale: bfloat16 variable.
        layer: int or `None`, the slice of stacked variables that is meant.
        stage: `_Stage` of stacked variables.
    """

    dtype = "float32"

    def __init__(self, stored, scale, layer=None, stage=None):
        self.stored, self.scale = stored, scale
        self.layer, self.stage = layer, stage
        self.layout = stored.quantized_format
        self.shape = self.layout.shape

    def assign(self, array):
        """Quantise an array into the variables."""
        self.store(self.layout.quantize(array))

    def store(self, parts):
        """Fill the variables with what `QuantizedFormat.quantize` gave."""
        if self.stage is not None:
            self.stage.put(self.layer, parts)
            return
        fill(self.stored, parts[0])
        fill(self.scale, parts[1])

    def numpy(self):
        """Give the float32 array that the variables stand for."""
        stored, scale = self.stored.value, self.scale.value
        if self.layer is not None:
            stored, scale = stored[self.layer], scale[self.layer]
        return to_host(self.layout.dequantize(stored, scale, "float32"))


class _Stage:
    """Collects the layers of stacked variables, which are filled whole.

    Args:
        variables: the int8 variable and its scale.
    """

    def __init__(self, variables):
        self.variables = variables
        self.wholes, self.missing = None, set()

    def put(self, layer, parts):
        pairs = zip(self.variables, parts, strict=True)
        if self.wholes is None:
            self.wholes = [
                np.empty(one.shape, part.dtype) for one, part in pairs
            ]
            self.missing = set(range(len(self.wholes[0])))
        for whole, part in zip(self.wholes, parts, strict=True):
            whole[layer] = part
        self.missing.discard(layer)
        if not self.missing:
            for variable, whole in zip(
                self.variables, self.wholes, strict=True
            ):
                fill(variable, whole)
            self.wholes = None
