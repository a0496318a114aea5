"""Both forms of a stack: same results, same gradients, same files."""

import keras
import numpy as np
import pytest
from keras import ops

from tests.helpers.gradients import gradients
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION
from tests.helpers.tiny_models import error
from tests.helpers.tiny_models import golden_inputs
from tests.helpers.tiny_models import run


def gradients_of(backbone, inputs):
    """Return the gradients of a mean over hidden states."""
    return gradients(lambda: ops.mean(ops.square(backbone(inputs))), backbone)


def compare(found, wanted):
    # Gradients of norms are sums over all tokens, in a different order in each
    # form. A difference of 2.3e-5 of the largest was measured. A bias of
    # SigLIP's keys adds the same value to all logits of a query. Its gradient
    # is zero except for rounding, so the scale is that of its kernel's
    # gradient.
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


REMATS = [None, "block"] + ["dots"] * (keras.backend.backend() == "jax")


@pytest.mark.parametrize("remat", REMATS)
def test_outputs_and_gradients_are_equal(golden_backbone, inputs, remat):
    plain = golden_backbone(form="unrolled")
    other = golden_backbone(form="scanned", remat=remat)
    wanted = ops.convert_to_numpy(run(plain, inputs))
    assert error(run(other, inputs), wanted) < 2e-5
    wanted, found = gradients_of(plain, inputs), gradients_of(other, inputs)
    assert list(wanted) == list(found)
    compare(found, wanted)


def test_pairs_keep_half_and_change_nothing(inputs):
    from keras_paligemma import PaliGemmaBackbone

    # The encoder has an odd number of blocks, so they are not paired.
    sizes = IMAGE_SIZE, VISION, TEXT | {"num_layers": 4}
    plain = PaliGemmaBackbone(*sizes, form="scanned", remat="block")
    other = PaliGemmaBackbone(*sizes, form="scanned", remat="pair")
    assert other.text_decoder.blocks.in_pairs
    assert not other.vision_encoder.blocks.in_pairs
    random = np.random.default_rng(0)
    values = [
        weight + random.normal(0, 0.1, weight.shape)
        for weight in plain.get_weights()
    ]
    plain.set_weights(values)
    other.set_weights(values)
    wanted = ops.convert_to_numpy(run(plain, inputs))
    assert error(run(other, inputs), wanted) < 2e-5
    compare(gradients_of(other, inputs), gradients_of(plain, inputs))
    if keras.backend.backend() == "jax":
        assert (kept_by_layer(plain), kept_by_layer(other)) == ([4], [2])


def kept_by_layer(backbone):
    """Return the first axes of the stored activations of the decoder."""
    import jax

    x_BTD = np.ones((2, 5, 64), "float32")
    positions_BT = np.tile(np.arange(5), (2, 1))
    mask_BTS = np.ones((2, 5, 5), bool)
    _, backward = jax.vjp(
        lambda x_BTD: backbone.text_decoder(x_BTD, mask_BTS, positions_BT),
        x_BTD,
    )
    leaves = jax.tree.leaves(backward)
    return [leaf.shape[0] for leaf in leaves if leaf.shape[1:] == x_BTD.shape]


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_nothing_when_unrolled(golden_backbone, inputs, remat):
    if remat == "dots" and keras.backend.backend() != "jax":
        with pytest.raises(ValueError, match="policy of JAX"):
            golden_backbone(remat=remat)
        return
    plain = gradients_of(golden_backbone(form="unrolled"), inputs)
    other = golden_backbone(form="unrolled", remat=remat)
    compare(gradients_of(other, inputs), plain)


@pytest.mark.parametrize(
    "forms", [("unrolled", "scanned"), ("scanned", "unrolled")]
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


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_files_of_other_weights_are_refused(tmp_path, form):
    """Keras would leave out what the model has no place for."""
    from keras_paligemma import PaliGemmaBackbone

    def build(**text):
        return PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT | text, form=form)

    plain, adapted = build(), build()
    adapted.enable_lora(2)
    files = {}
    for name, backbone in (("plain", plain), ("adapted", adapted)):
        files[name] = tmp_path / f"{name}.weights.h5"
        backbone.save_weights(files[name])
    first, shallow = build(use_post_norms=False), build(num_layers=2)
    for backbone, file in (
        (plain, "adapted"),
        (adapted, "plain"),
        (first, "plain"),
        (shallow, "plain"),
    ):
        with pytest.raises(ValueError, match="other sizes, norms or adapters"):
            backbone.load_weights(files[file])


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_layers_begin_with_values_of_their_own(form):
    from keras_paligemma import PaliGemmaBackbone

    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION, TEXT, form=form)
    backbone.enable_lora(2)
    backbone.enable_lora(2, name="second")
    kernel = backbone.weights_by_name()["text_decoder/blocks/mlp/up/kernel"]
    first, second, *_ = kernel.read()
    assert (first != second).mean() > 0.99
    for name in ("default", "second"):
        for value in backbone.adapters.values(name).values():
            assert (value[0] != value[1]).all() or not value.any()


def test_auto_is_unrolled_without_a_tpu(golden_backbone):
    backbone = golden_backbone(form="auto")
    assert not backbone.text_decoder.blocks.scanned


@pytest.mark.parametrize("argument", ["form", "remat"])
def test_unknown_choice(golden_backbone, argument):
    with pytest.raises(ValueError, match="Received: 'rolled'"):
        golden_backbone(**{argument: "rolled"})


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
@pytest.mark.parametrize("last", [1, 3])
def test_last_tokens_are_those_of_all(golden_backbone, inputs, form, last):
    """Other tokens only give keys and values; the cache is the same."""
    backbone = golden_backbone(form=form)
    decoder = backbone.text_decoder
    x_BTD = backbone.embed(inputs)
    mask, positions = backbone.mask_and_positions(
        inputs, x_BTD.shape[1] - inputs["token_ids"].shape[1]
    )

    def answer(last):
        cache = decoder.make_cache(x_BTD.shape[0], x_BTD.shape[1] + 2)
        return decoder(x_BTD, mask, positions, cache=cache, index=0, last=last)

    whole_BTD, cache = answer(None)
    last_BTD, same = answer(last)
    np.testing.assert_allclose(
        ops.convert_to_numpy(last_BTD),
        ops.convert_to_numpy(whole_BTD[:, -last:]),
        atol=1e-5,
    )
    for array, other in zip(
        keras.tree.flatten(cache), keras.tree.flatten(same), strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(array), ops.convert_to_numpy(other)
        )
