"""Activations are counted where the backward pass goes."""

from keras_paligemma.tuning.memory import estimate_memory


def activations(model):
    return estimate_memory(model.backbone, 2, 8, 4)["activations"]


def test_the_projector_is_after_the_vision_tower(tiny_model):
    model = tiny_model()
    model.freeze("vision_encoder/*")
    decoder_alone = activations(model)
    for trained in ("projector", "final_norm"):
        model.unfreeze(f"vision_encoder/{trained}/*")
        assert activations(model) == decoder_alone
    model.unfreeze("vision_encoder/patch_embedding/*")
    assert activations(model) > decoder_alone


def test_adapters_of_the_projector_alone(tiny_model):
    found = []
    for targets in (["query"], ["query", "projector"]):
        model = tiny_model()
        model.enable_lora(2, targets)
        found.append(activations(model))
    assert found[0] == found[1]
