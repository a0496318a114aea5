"""Bytes that a decoding step moves on a v5e chip, by the TPU's compiler.

`python -m tests.planning.decode_step PRESET BATCH [int8]` prints JSON, in an
environment that has `planning.compiled.ENVIRONMENT`.
"""

import json
import sys

import numpy as np

from keras_paligemma.planning import compiled
from keras_paligemma.planning import machines
from keras_paligemma.planning.job import Job
from keras_paligemma.sharding.layouts import Layout
from tests.planning import hlo


def main(preset, batch, quantize=None):
    job = Job(preset, int(batch), quantize=quantize)
    topology = machines.find("v5e-1").topology
    program = compiled.lower_generation(job, Layout("data"), 32, topology)
    program = program.compile(compiler_options=compiled.QUICK)
    computations = hlo.read(program.as_text())
    backbone, _ = job.model(None)
    config = backbone.text_config
    length = backbone.image_sequence_length + job.prompt_length + 32 - 1
    keys = int(batch) * length * config.num_key_value_heads * config.head_dim
    # The loop over tokens is the one that contains a loop over layers.
    [step] = [
        body
        for body in computations
        if any(
            hlo.is_over_layers(instruction)
            for instruction in computations[body]
        )
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
                "cached": 2 * keys * config.num_layers * 2,
                "copied": hlo.copied(computations, step),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
