"""Products on CPUs: the order of axes, and integers."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_paligemma.compat import compiling_for
from keras_paligemma.layers import cpu_products
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.stack import LayerStack
from keras_paligemma.layers.weight import Weight
from tests.helpers.gradients import differentiate

INPUTS, OUTPUTS = (3, 10), (4, 2)

only_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="Code for JAX on a CPU."
)


def kernel_and_rows(rows):
    random = np.random.default_rng(rows)
    kernel = random.normal(size=INPUTS + OUTPUTS).astype("float32")
    return kernel, random.normal(size=(rows, *INPUTS)).astype("float32")


def outputs_first(kernel):
    return np.transpose(kernel, (2, 3, 0, 1))


@only_jax
@pytest.mark.parametrize("rows", [1, 2, 7, cpu_products.FEW_ROWS + 1])
def test_product_is_numpys(rows):
    kernel, x = kernel_and_rows(rows)
    with cpu_products.answering_scope():
        found = cpu_products.product(
            ops.array(outputs_first(kernel)), ops.array(x), INPUTS
        )
    np.testing.assert_allclose(found, np.tensordot(x, kernel, 2), atol=1e-5)


@only_jax
@pytest.mark.parametrize("rows", [1, 5])
def test_bfloat16_is_rounded_once(rows):
    """Sums are computed in float32, and only the result is rounded."""
    kernel, x = kernel_and_rows(rows)
    kernel, x = (array.astype(ml_dtypes.bfloat16) for array in (kernel, x))
    with cpu_products.answering_scope():
        found = cpu_products.product(
            ops.array(outputs_first(kernel)), ops.array(x), INPUTS
        )
    assert found.dtype == "bfloat16"
    exact = np.tensordot(x.astype("float64"), kernel.astype("float64"), 2)
    error = np.abs(np.asarray(found, "float64") - exact)
    assert np.all(error <= np.abs(exact) * 2.0**-8 + 1e-6)


@only_jax
@pytest.mark.parametrize("rows", [1, 2, 7, cpu_products.FEW_ROWS + 1])
def test_integers_err_by_half_a_step(rows):
    """The error of a value is at most half a quantization step of its row."""
    random = np.random.default_rng(0)
    _, x = kernel_and_rows(rows)
    x[0] *= 1000
    kernel = random.integers(-127, 128, INPUTS + OUTPUTS).astype("int8")
    scale = random.uniform(0.1, 1, (*OUTPUTS, 1, 1)).astype("float32")
    inputs = outputs_first(kernel), scale, x
    with cpu_products.answering_scope():
        found = cpu_products.integer_product(*map(ops.array, inputs), INPUTS)
    scale = scale[..., 0, 0]
    exact = np.tensordot(x.astype("float64"), kernel.astype("float64"), 2)
    step = np.abs(x).reshape(rows, -1).max(1)[:, None, None] / (127 * 254)
    bound = step / 2 * np.abs(kernel.astype("float64")).sum((0, 1)) * scale
    error = np.abs(np.asarray(found, "float64") - exact * scale)
    assert np.all(error <= 1.001 * bound)
    # Rows are rounded to two 8-bit digits, so there is an error.
    assert error.max() > 0


@only_jax
def test_rows_of_zeros_stay_zeros():
    kernel = np.ones(OUTPUTS + INPUTS, "int8")
    scale = np.ones((*OUTPUTS, 1, 1), "float32")
    x = np.zeros((2, *INPUTS), "float32")
    found = cpu_products.integer_product(
        *map(ops.array, (kernel, scale, x)), INPUTS
    )
    np.testing.assert_array_equal(found, np.zeros((2, *OUTPUTS)))


@only_jax
@pytest.mark.parametrize("tiles", [False, True])
def test_only_answers_are_of_integers(tiles, monkeypatch):
    """Training uses float products, which have the correct gradient."""
    monkeypatch.setattr(cpu_products, "has_integer_tiles", lambda: tiles)
    for rows in (2, cpu_products.FEW_ROWS + 1):
        _, x = kernel_and_rows(rows)
        assert not cpu_products.should_use_integers(x, INPUTS)
        with cpu_products.answering_scope():
            few = rows == 2
            used = cpu_products.should_use_integers(x, INPUTS)
            assert used == (few or tiles)


@only_jax
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_taken_without_a_copy_of_the_table(dtype):
    """XLA:CPU would take rows of bfloat16 from a float32 copy."""
    import jax

    table = np.random.default_rng(0).normal(size=(300, 7)).astype(dtype)
    ids = np.array([[1, 299], [0, 1]])

    def rows(table, ids):
        with cpu_products.answering_scope():
            # Not the last operation, as in a model.
            taken = cpu_products.take_rows(table, ids)
            return taken, ops.matmul(taken, ops.transpose(taken, (0, 2, 1)))

    program = jax.jit(rows).lower(table, ids).compile()
    np.testing.assert_array_equal(program(table, ids)[0], table[ids])
    assert ("f32[300,7]" in program.as_text()) == (dtype == "float32")


@only_jax
def test_only_programs_of_this_machine_have_outputs_first():
    def shape():
        layer = Projection(INPUTS, OUTPUTS)
        layer.build()
        return tuple(layer.kernel.shape)

    assert shape() == OUTPUTS + INPUTS
    with compiling_for("cpu"):
        assert shape() == INPUTS + OUTPUTS
    with compiling_for("tpu"):
        assert shape() == INPUTS + OUTPUTS


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_files_keep_their_order(form, quantization):
    """`Weight` always reads and assigns kernels with inputs first."""
    stack = LayerStack(
        lambda: Projection(
            INPUTS, OUTPUTS, quantization=quantization, name="block"
        ),
        num_layers=2,
        form=form,
        name="blocks",
    )
    stack.build()
    weights = stack.weights_by_name()
    kernel = weights["kernel"]
    if quantization is None:
        values = np.random.default_rng(0).normal(size=(2, *INPUTS, *OUTPUTS))
        kernel.assign(values.astype("float32"))
    assert kernel.shape[0] == 2 and kernel.shape[-2:] == OUTPUTS
    stored = {name: weight.read() for name, weight in weights.items()}
    for name, weight in weights.items():
        assert weight.shape == stored[name].shape
        weight.assign(stored[name])
        np.testing.assert_array_equal(weight.read(), stored[name])
        for layer, array in zip(
            weight.read_layers(), stored[name], strict=True
        ):
            np.testing.assert_array_equal(layer, array)
    if quantization is None:
        np.testing.assert_array_equal(kernel.read(), values.astype("float32"))
        kernel.update(lambda layer: layer + ops.ones(INPUTS + OUTPUTS))
        np.testing.assert_allclose(kernel.read(), values + 1, atol=1e-6)


@pytest.mark.parametrize("rows", [2, cpu_products.FEW_ROWS + 1])
def test_gradients_are_those_of_inputs_first(rows):
    kernel, x = kernel_and_rows(rows)

    layer = Projection(INPUTS, OUTPUTS)
    layer.build()
    Weight((layer.kernel,)).assign(kernel)

    def loss(values):
        x, value = values
        with keras.StatelessScope([(layer.kernel, value)]):
            return ops.sum(ops.sin(layer(x)))

    value = ops.convert_to_tensor(layer.kernel.value)
    of_x, of_kernel = differentiate(loss, [ops.convert_to_tensor(x), value])
    upstream = np.cos(np.tensordot(x, kernel, 2))
    np.testing.assert_allclose(
        of_x, np.tensordot(upstream, kernel, ((1, 2), (2, 3))), atol=1e-4
    )
    wanted = np.tensordot(x, upstream, ((0,), (0,)))
    if layer.kernel.outputs_first:
        wanted = outputs_first(wanted)
    np.testing.assert_allclose(of_kernel, wanted, atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_keras_files_have_one_order(quantization):
    """Weights saved with one order of axes load into the other."""

    def built():
        layer = Projection(INPUTS, OUTPUTS, True, quantization=quantization)
        layer.build()
        return layer

    here, store = built(), {}
    with compiling_for("cpu"):
        elsewhere = built()
    here.save_own_variables(store)
    elsewhere.load_own_variables(store)
    again = {}
    elsewhere.save_own_variables(again)
    assert list(store) == list(again)
    for key, array in store.items():
        np.testing.assert_array_equal(array, again[key])
    kernel = Weight((elsewhere.kernel,)).read()
    assert kernel.shape == INPUTS + OUTPUTS
    np.testing.assert_array_equal(kernel, elsewhere.kernel)
    with pytest.raises(ValueError, match="does not fit"):
        elsewhere.load_own_variables({"0": kernel})
