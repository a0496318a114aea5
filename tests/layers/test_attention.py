"""The mask rule, rotary positions and attention in isolation."""

import numpy as np
import pytest
from keras import ops

from keras_paligemma.layers.attention import attend
from keras_paligemma.layers.attention import attention_mask
from keras_paligemma.layers.attention import rotary_angles
from keras_paligemma.layers.attention import rotate
from keras_paligemma.layers.attention import token_positions
from tests.helpers.tiny_models import GOLDEN


def test_mask_is_the_docstrings():
    rows = [
        line.split("#")[0].split()[-8:-1]
        for line in attention_mask.__doc__.splitlines()
        if line.strip().startswith(("t: i", "i ", ". padding", "p ", "r "))
    ]
    drawn = np.array(rows, int).astype(bool)
    valid = np.array([[1, 1, 0, 1, 1, 1, 1]], bool)
    response = np.array([[0, 0, 0, 0, 0, 1, 1]], bool)
    mask = ops.convert_to_numpy(attention_mask(valid, response))
    np.testing.assert_array_equal(mask[0], drawn)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_mask_is_the_originals(case):
    with np.load(GOLDEN / "masks_schedules.npz") as file:
        mask = attention_mask(
            file[f"{case}/input_mask"], file[f"{case}/mask_ar"]
        )
        np.testing.assert_array_equal(
            ops.convert_to_numpy(mask), file[f"{case}/attn_mask"]
        )


def test_padding_takes_no_position():
    valid = np.array([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 0]], bool)
    positions = ops.convert_to_numpy(token_positions(valid))
    assert positions[0][valid[0]].tolist() == [0, 1, 2]
    assert positions[1][valid[1]].tolist() == [0, 1, 2, 3]


def test_rotation_depends_on_distance_alone():
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 1, 1, 1, 8)).astype("float32")

    def product(query_position, key_position):
        one = rotate(query, rotary_angles(np.array([[query_position]]), 8))
        two = rotate(key, rotary_angles(np.array([[key_position]]), 8))
        return float(ops.sum(one * two))

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)


def test_attention_is_in_float32_whatever_the_inputs():
    random = np.random.default_rng(1)
    shapes = ((2, 5, 6, 8), (2, 7, 3, 8), (2, 7, 3, 8))
    half = [
        ops.cast(random.normal(size=shape) * 6, "bfloat16") for shape in shapes
    ]
    full = [ops.cast(array, "float32") for array in half]
    mask = random.random((2, 5, 7)) > 0.3
    mask[:, :, 0] = True
    one = attend(*half, mask, cap=50.0)
    two = attend(*full, mask, cap=50.0)
    assert one.dtype == half[0].dtype
    # Only the weights and the result are rounded to bfloat16. Logits in
    # bfloat16 would differ by whole units here.
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(one, "float32")),
        ops.convert_to_numpy(two),
        atol=0.03 * float(ops.max(ops.absolute(two))),
        rtol=0,
    )


def test_a_row_that_sees_nothing_is_finite():
    x = np.ones((1, 3, 2, 4), "float32")
    mask = np.zeros((1, 3, 3), bool)
    assert np.isfinite(ops.convert_to_numpy(attend(x, x, x, mask))).all()
