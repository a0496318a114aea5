"""Checks that hold for every layer whose arguments are JSON values."""

import keras
import numpy as np
from keras import ops


def assert_layer_contract(layer, inputs, output_dtype="bfloat16", **call):
    """Check that a layer and its copy by config follow the dtype policy.

    Args:
        layer: Keras layer with dtype bfloat16, not built yet.
        inputs: tuple of arrays, positional arguments of the call.
        output_dtype: str, dtype of the output.
        **call: keyword arguments of the call.
    """
    layer.build()
    again = type(layer).from_config(layer.get_config())
    again.build()
    names = [variable.path.partition("/")[2] for variable in layer.variables]
    assert names == [
        variable.path.partition("/")[2] for variable in again.variables
    ]
    again.set_weights(layer.get_weights())
    found, wanted = layer(*inputs, **call), again(*inputs, **call)
    np.testing.assert_array_equal(
        *(ops.convert_to_numpy(ops.cast(x, "float32")) for x in (found, wanted))
    )
    assert np.isfinite(ops.convert_to_numpy(ops.cast(found, "float32"))).all()
    assert keras.backend.standardize_dtype(found.dtype) == output_dtype
    # Only a quantised kernel has integers. All floats have the policy's dtype.
    assert {weight.dtype for weight in layer.weights} <= {"bfloat16", "int8"}
