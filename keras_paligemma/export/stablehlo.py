"""A model as StableHLO, written and read by `jax.export`."""

import keras
import numpy as np

from keras_paligemma.checkpoints.storage.safetensors import write_safetensors
from keras_paligemma.compat import compiling_for
from keras_paligemma.export.forward import response_logits
from keras_paligemma.export.forward import shapes_and_dtypes
from keras_paligemma.layers.weight import Weight
from keras_paligemma.layers.weight import as_variable
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse

ENTRY = "generate.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(model, folder):
    """Write two functions, and the weights that both take as an argument.

    `forward.stablehlo` returns logits (B, R, V), `generate.stablehlo` token ids
    (B, R) of greedy decoding, 0 after the end token. Both take a dict of the
    weights in `model.safetensors` and a dict of the preprocessor's arrays, for
    any batch size. Each file runs on all of `PLATFORMS`.

    Args:
        model: `PaliGemmaCausalLM` of the JAX backend, with a preprocessor.
        folder: path of an empty folder.
    """
    import jax
    from jax import export

    variables = {
        variable.path: variable for variable in model.backbone.variables
    }
    # In the order of files, not in an order chosen for this machine.
    scanned = {
        id(weight.variables[0])
        for weight in model.backbone.weights_by_name().values()
        if weight.form == "scanned"
    }
    stored = {
        path: Weight(
            (variable,), "scanned" if id(variable) in scanned else None
        )
        for path, variable in variables.items()
    }
    weights = {
        path: jax.ShapeDtypeStruct(weight.shape, variables[path].dtype)
        for path, weight in stored.items()
    }
    (batch,) = export.symbolic_shape("batch")
    inputs = {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype)
        for name, (shape, dtype) in shapes_and_dtypes(model).items()
    }

    def exported(function):
        def stateless(weights, inputs):
            values = [
                (
                    variable,
                    as_variable(
                        weights[path], variable, int(id(variable) in scanned)
                    ),
                )
                for path, variable in variables.items()
            ]
            with keras.StatelessScope(state_mapping=values):
                return function(model, inputs)

        # Code specific to one platform could not run on the others.
        with compiling_for("cpu"):
            made = export.export(jax.jit(stateless), platforms=PLATFORMS)(
                weights, inputs
            )
        return made.serialize()

    (folder / "forward.stablehlo").write_bytes(exported(response_logits))
    (folder / ENTRY).write_bytes(exported(greedy_ids))
    write_safetensors(
        folder,
        ((path, weight.read()) for path, weight in stored.items()),
        max_shard_size=np.inf,
    )


def greedy_ids(model, inputs):
    """Decode greedily.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        inputs: dict as `forward.response_logits` takes it; tokens at the
            beginning of its responses are kept.

    Returns:
        int32 tensor (B, R) of token ids, 0 after the end token.
    """
    longest = model.preprocessor.response_length
    stop = model.preprocessor.tokenizer.end_token_id
    inputs = {
        "images": inputs["images"],
        **PromptAndResponse.cut(inputs, longest).arrays(),
    }
    return model.generate_step(inputs, (stop,))["token_ids"]
