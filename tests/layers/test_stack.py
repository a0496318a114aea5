"""Both forms of repetition: same results, same gradients, same files."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.conftest import error
from tests.conftest import golden_inputs
from tests.conftest import run


def gradients(backbone, inputs):
    """Gradients of a sum over hidden states, by stable name."""
    weights = backbone.weights_by_name()
    flat = [
        variable
        for weight in weights.values()
        for variable in (weight if isinstance(weight, list) else [weight])
    ]

    def loss(values):
        with keras.StatelessScope(list(zip(flat, values, strict=True))):
            return ops.mean(ops.square(backbone(inputs)))

    values = [ops.convert_to_tensor(variable.value) for variable in flat]
    found = iter(differentiate(loss, values))
    return {
        name: np.stack([next(found) for _ in weight])
        if isinstance(weight, list)
        else next(found)
        for name, weight in weights.items()
    }


def differentiate(loss, values):
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        found = jax.jit(jax.grad(loss))(values)
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            total = loss(values)
        found = tape.gradient(total, values)
        found = [ops.convert_to_tensor(one) for one in found]
    else:
        values = [value.detach().requires_grad_() for value in values]
        loss(values).backward()
        found = [value.grad for value in values]
    return [ops.convert_to_numpy(one) for one in found]


def compare(found, wanted):
    # Gradients of norms sum over all tokens, in another order in each form:
    # 2.3e-5 of the largest was seen.
    # A bias of SigLIP's keys adds the same to all logits of a query: its
    # gradient is zero but for rounding, so it is compared with its kernel's.
    for name, gradient in wanted.items():
        larger = wanted[name.replace("key/bias", "key/kernel")]
        scale = max(np.abs(gradient).max(), np.abs(larger).max())
        assert scale > 0, name
        np.testing.assert_allclose(
            found[name], gradient, atol=1e-4 * scale, err_msg=name
        )


@pytest.fixture
def inputs(expected):
    return {
        key: ops.convert_to_tensor(value[:2])
        for key, value in golden_inputs(expected).items()
    }


@pytest.mark.parametrize("remat", [None, "block"])
def test_outputs_and_gradients_are_equal(golden_backbone, inputs, remat):
    plain = golden_backbone(form="unrolled")
    other = golden_backbone(form="stacked", remat=remat)
    wanted = ops.convert_to_numpy(run(plain, inputs))
    assert error(run(other, inputs), wanted) < 2e-5
    wanted, found = gradients(plain, inputs), gradients(other, inputs)
    assert list(wanted) == list(found)
    compare(found, wanted)


def test_remat_changes_nothing_when_unrolled(golden_backbone, inputs):
    plain = gradients(golden_backbone(form="unrolled"), inputs)
    remat = gradients(golden_backbone(form="unrolled", remat="block"), inputs)
    compare(remat, plain)


@pytest.mark.parametrize(
    "forms", [("unrolled", "stacked"), ("stacked", "unrolled")]
)
def test_each_form_loads_the_others_files(
    golden_backbone, inputs, tmp_path, forms
):
    from keras_paligemma import PaliGemmaBackbone

    written = golden_backbone(form=forms[0])
    config = written.get_config() | {"form": forms[1], "name": "other"}
    wanted = ops.convert_to_numpy(run(written, inputs))

    written.save_weights(tmp_path / "all.weights.h5")
    read = PaliGemmaBackbone.from_config(config)
    read.load_weights(tmp_path / "all.weights.h5")
    assert error(run(read, inputs), wanted) < 2e-5

    written.save_to_preset(tmp_path / "preset")
    read = PaliGemmaBackbone.from_preset(tmp_path / "preset", form=forms[1])
    assert error(run(read, inputs), wanted) < 2e-5


def test_auto_is_unrolled_without_a_tpu(golden_backbone):
    assert not golden_backbone().text_decoder.blocks.stacked


@pytest.mark.parametrize("argument", ["form", "remat"])
def test_unknown_choice(golden_backbone, argument):
    with pytest.raises(ValueError, match="Received: 'rolled'"):
        golden_backbone(**{argument: "rolled"})
