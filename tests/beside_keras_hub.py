"""Use our models after a KerasHub model was built; run by its test.

    python -m tests.beside_keras_hub first|second TEMPORARY_FOLDER

"first" imports this package before KerasHub's model is built, "second" after.
"""

import sys
from pathlib import Path

import keras
import keras_hub
import numpy as np

from tests.helpers.checks import check
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION


def main(order, folder):
    folder = Path(folder)
    if order == "first":
        import keras_paligemma.models.causal_lm  # noqa: F401
    task = keras_hub.models.PaliGemmaCausalLM(
        backbone=keras_hub.models.PaliGemmaBackbone(
            vocabulary_size=320,
            image_size=42,
            num_layers=1,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=64,
            intermediate_dim=224,
            head_dim=24,
            vit_patch_size=14,
            vit_num_heads=4,
            vit_hidden_dim=48,
            vit_intermediate_dim=88,
            vit_num_layers=1,
        ),
        preprocessor=None,
    )
    from keras_paligemma import PaliGemmaBackbone
    from keras_paligemma import PaliGemmaCausalLM

    layers = {"num_layers": 1}
    backbone = PaliGemmaBackbone(IMAGE_SIZE, VISION | layers, TEXT | layers)
    model = PaliGemmaCausalLM(backbone)
    with check("a task of KerasHub"):
        assert isinstance(model, keras_hub.models.CausalLM)
    inputs = {
        "images": np.zeros((2, 42, 42, 3), "float32"),
        "token_ids": np.arange(2, 16, dtype="int32").reshape(2, 7),
        "padding_mask": np.ones((2, 7), bool),
        "response_mask": np.arange(7)[None].repeat(2, 0) >= 4,
    }
    hidden = keras.ops.convert_to_numpy(backbone(inputs))
    with check("generate"):
        prompts = {
            key: value if key == "images" else value[:, :4]
            for key, value in inputs.items()
        }
        ids = model.generate(prompts, max_new_tokens=3, stop_token_ids=None)
        assert np.shape(ids) == (2, 3)
    with check("a .keras file"):
        model.save(folder / "model.keras")
        read = keras.saving.load_model(folder / "model.keras").backbone
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(read(inputs)), hidden
        )
    with check("a preset"):
        backbone.save_to_preset(folder / "preset")
        read = PaliGemmaBackbone.from_preset(folder / "preset")
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(read(inputs)), hidden
        )
    with check("layers"):
        names = {layer.name for layer in backbone.layers}
        assert {"vision_encoder", "text_decoder"} <= names, names
    with check("summary"):
        lines = []
        backbone.summary(print_fn=lines.append)
        assert "vision_encoder" in "\n".join(lines)
    with check("KerasHub's model"):
        assert task.backbone(inputs).shape == (2, 16, 64)


if __name__ == "__main__":
    main(*sys.argv[1:])
