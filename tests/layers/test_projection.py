"""Products with a kernel, whatever its axes and whatever sizes are known."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma.layers.projection import contract

# Shapes of the input and of the kernel, and how many axes are summed.
SHAPES = {
    "of a width": ((2, 5, 6), (6, 7), 1),
    "to heads": ((2, 5, 6), (6, 3, 4), 1),
    "from heads": ((2, 5, 3, 4), (3, 4, 6), 2),
    "of rows": ((5, 6), (6, 7), 1),
}


@pytest.fixture(params=SHAPES)
def product(request):
    """Return an input, a kernel, the summed axes and the product."""
    x_shape, kernel_shape, summed = SHAPES[request.param]
    random = np.random.default_rng(0)
    x = random.normal(size=x_shape).astype("float32")
    kernel = random.normal(size=kernel_shape).astype("float32")
    wanted = np.tensordot(x, kernel, summed)
    return x, kernel, kernel_shape[:summed], wanted


def test_products_are_numpys(product):
    x, kernel, axes, wanted = product
    found = contract(ops.convert_to_tensor(x), kernel, axes)
    np.testing.assert_allclose(ops.convert_to_numpy(found), wanted, atol=1e-5)


@pytest.mark.parametrize("unknown", [1, 2])
def test_sizes_may_be_unknown(product, unknown):
    x, kernel, axes, wanted = product
    unknown = min(unknown, x.ndim - len(axes))
    names = [None] * unknown
    x_shape, shape = (names + list(a.shape[unknown:]) for a in (x, wanted))
    found = contract(keras.KerasTensor(x_shape), kernel, axes)
    assert list(found.shape) == shape


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs of TensorFlow"
)
def test_no_input_is_transposed_in_a_graph(product):
    import tensorflow as tf

    x, kernel, axes, wanted = product
    unknown = len(x.shape) - len(axes)
    shape = (*[None] * unknown, *x.shape[unknown:])
    function = tf.function(
        lambda x: contract(x, kernel, axes),
        input_signature=[tf.TensorSpec(shape, "float32")],
    )
    np.testing.assert_allclose(function(x), wanted, atol=1e-5)
    graph = function.get_concrete_function().graph
    assert "Transpose" not in {op.type for op in graph.get_operations()}
