"""Compare our gradients with PEFT's in float64.

`python -m tests.checkpoints.peft_in_double` prints, as JSON, the largest
difference of the loss and of each adapter's gradient. It runs in its own
process because it replaces float32 with float64 in Keras, transformers and this
package.
"""

import json
import tempfile

import jax
import keras
import torch
from keras import ops
from keras.src.backend.common import dtypes


def to_double():
    """Replace float32 with float64 wherever it is requested."""
    jax.config.update("jax_enable_x64", True)
    # On JAX, Keras computes in 32 bits by default, whatever the dtype.
    dtypes.BIT64_TO_BIT32_DTYPE.clear()

    def wider(dtype):
        return "float64" if dtype == "float32" else dtype

    cast, arange = ops.cast, ops.arange
    add_weight = keras.layers.Layer.add_weight
    ops.cast = lambda x, dtype: cast(x, wider(dtype))
    ops.arange = lambda *args, dtype=None: arange(*args, dtype=wider(dtype))
    keras.layers.Layer.add_weight = lambda layer, dtype=None, **kwargs: (
        add_weight(layer, dtype=wider(dtype), **kwargs)
    )
    torch.Tensor.float = torch.Tensor.double
    torch.float32 = torch.float = torch.float64


def main():
    # The model is initialized and its adapters are written in float32.
    from tests.checkpoints import test_peft
    from tests.helpers.tiny_models import error
    from tests.helpers.tiny_models import transformers_backbone

    base = test_peft.reference.tiny_transformers_model(seed=3)
    model = test_peft.adapted(base, **test_peft.KINDS["popular"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        to_double()
        backbone = transformers_backbone(base, dtype="float64")
        backbone.load_adapter(folder)
    model.double()
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            numbers = torch.arange(len(buffer), dtype=torch.float64)
            buffer.copy_(10_000.0 ** -(numbers / len(buffer)))
        if name.endswith("embed_scale"):
            buffer.fill_(base.config.text_config.hidden_size**0.5)
    inputs, targets, weights = test_peft.batch()
    inputs["images"] = inputs["images"].astype("float64")
    wanted, theirs = test_peft.of_peft(model, inputs, targets, weights)
    found, ours = test_peft.of_ours(backbone, inputs, targets, weights)
    pairs = test_peft.pairs_of(backbone, ours, theirs)
    print(
        json.dumps(
            {
                "loss": abs(found / wanted - 1),
                "gradients": {
                    name: float(error(*pair)) for name, *pair in pairs
                },
            }
        )
    )


if __name__ == "__main__":
    main()
