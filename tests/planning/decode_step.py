"""What a decoding step needs of a v5e chip, by the TPU's own compiler.

`python -m tests.planning.decode_step PRESET BATCH [int8]` prints JSON. It runs in
a process that has `planning.compiled.ENVIRONMENT`, since JAX must not start
without it.
"""

import json
import re
import sys

import jax
import keras
import numpy as np

from keras_paligemma.compat import compiling_for
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import advance
from keras_paligemma.generation.loop import begin
from keras_paligemma.generation.loop import row_defaults
from keras_paligemma.planning import compiled
from keras_paligemma.planning import machines
from keras_paligemma.planning.job import Job
from keras_paligemma.sharding.layouts import Layout

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}


def compile_loop(preset, batch, quantize=None, responses=32):
    """Compile the loop of `generate` without its prefill; the state is donated.

    Returns:
        The compiled program, the state's cache as shapes, and the backbone.
    """
    job = Job(preset, batch, 32, responses, quantize=quantize)
    topology = machines.find("v5e-1").topology
    model, distribution = compiled._model(job, Layout("data"), None, topology)
    backbone = model.backbone
    variables = model.trainable_variables + model.non_trainable_variables
    plan, shared = Plan(), {"stop_ids": np.array([1], "int32"), "sampler": []}

    def program(function):
        def run(values, *arguments):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return function(*arguments)

        return run

    def begun(rows):
        rows = row_defaults(rows) | rows
        return begin(backbone, plan, rows, shared), rows

    def advanced(rows, state):
        return advance(backbone, plan, rows, shared, state)

    def given(tokens, dtype):
        return jax.ShapeDtypeStruct((batch, tokens), dtype)

    size = backbone.image_size
    rows = {
        "images": jax.ShapeDtypeStruct((batch, size, size, 3), "float32"),
        "prompt_ids": given(job.prompt_length, "int32"),
        "prompt_mask": given(job.prompt_length, "bool"),
        "response_ids": given(responses, "int32"),
        "response_mask": given(responses, "bool"),
    }
    values = compiled._abstract(distribution, variables)
    with distribution.scope(), compiling_for("tpu"):
        state, rows = jax.eval_shape(program(begun), values, rows)
        loop = jax.jit(program(advanced), donate_argnums=2, keep_unused=True)
        lowered = loop.lower(values, rows, state)
    found = lowered.compile(compiler_options=compiled.QUICK)
    return found, state.cache["layers"], backbone


def results(hlo):
    """Return (computation, operation, bytes) of each instruction of a module.

    Instructions inside of fusions are not among them: they write nothing.
    """
    found, name = [], None
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[1]
        one = re.match(
            r"\s+(?:ROOT )?%[\w.-]+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line
        )
        if one and not name.startswith("fused") and one[1] in SIZES:
            count = np.prod([int(n) for n in one[2].split(",") if n], dtype=int)
            found.append((name, one[3], int(count) * SIZES[one[1]]))
    return found


def main(preset, batch, quantize=None):
    loop, cache, backbone = compile_loop(preset, int(batch), quantize)
    decoder = backbone.text_decoder
    costs = loop.cost_analysis()
    memory = loop.memory_analysis()
    sizes = {
        "bytes": costs["bytes accessed"],
        "table": nbytes(decoder.token_embedding.variables),
        "weights": nbytes(decoder.variables),
        "cache": sum(
            int(np.prod(one.shape)) * one.dtype.itemsize for one in cache
        ),
        "layers": backbone.num_layers,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "results": results(loop.as_text()),
    }
    print(json.dumps(sizes))
    return loop


def nbytes(variables):
    return sum(
        int(np.prod(one.shape)) * np.dtype(one.dtype).itemsize
        for one in variables
        if "adapter" not in one.name
    )


if __name__ == "__main__":
    loop = main(*sys.argv[1:4])
    if len(sys.argv) > 4:
        open(sys.argv[4], "w").write(loop.as_text())
