"""The contract of every layer whose arguments are JSON."""

import keras
import numpy as np
from keras import ops


def assert_layer_contract(layer, inputs, output_dtype="bfloat16", **call):
    """Check that a layer follows its dtype policy, as does its copy by config.

    Args:
        layer: Keras layer of dtype bfloat16, not built yet.
        inputs: tuple of arrays, arguments of the call.
        output_dtype: str, dtype of the output.
        **call: further arguments of the call.
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
    # Only a quantised kernel is of integers; floats are of the policy's dtype.
    assert {weight.dtype for weight in layer.weights} <= {"bfloat16", "int8"}
