"""Bytes moved by a decoding step on a v5e chip, from the TPU's compiler.

`python -m tests.planning.decode_step PRESET BATCH [QUANTIZE [CACHE_DTYPE]]`
prints JSON. It must run in an environment with `planning.compiled.ENVIRONMENT`
set. "-" means no quantization.
"""

import json
import sys

import numpy as np

from keras_paligemma.planning import compiled
from keras_paligemma.planning import machines
from keras_paligemma.planning.job import Job
from keras_paligemma.sharding.layouts import Layout
from tests.planning import hlo


def main(preset, batch, quantize="-", cache_dtype=None):
    quantize = None if quantize == "-" else quantize
    job = Job(preset, int(batch), quantize=quantize, cache_dtype=cache_dtype)
    topology = machines.find("v5e-1").topology
    program = compiled.lower_generation(job, Layout("data"), 32, topology)
    program = program.compile(compiler_options=compiled.QUICK)
    computations = hlo.read(program.as_text())
    backbone, _ = job.model(None)
    config = backbone.text_config
    length = backbone.image_sequence_length + job.prompt_length + 32 - 1
    heads = int(batch) * length * config.num_key_value_heads
    # In int8, each head has a float32 scale.
    head = config.head_dim + 4 if cache_dtype else 2 * config.head_dim
    # The loop over tokens contains exactly one loop over layers. A prefill in
    # groups of rows contains the loops of both towers.
    [step] = [
        body
        for body in computations
        if sum(map(hlo.is_over_layers, computations[body])) == 1
        and not body.startswith("main")
    ]
    print(
        json.dumps(
            {
                "moved": hlo.moved(computations, step, config.num_layers),
                "weights": sum(
                    int(np.prod(variable.shape))
                    * np.dtype(variable.dtype).itemsize
                    for variable in backbone.text_decoder.variables
                ),
                "cached": 2 * heads * head * config.num_layers,
                "copied": hlo.copied(computations, step),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
