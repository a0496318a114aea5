"""A training step by the TPU's own compiler, without a TPU.

Run as a process of its own, since the compiler asks for its environment before
JAX starts: reads steps as JSON lines, writes what the compiler says of each.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

from keras_paligemma.distribution.layouts import Layout

ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    # Several processes may use the library, and there is no TPU to ask.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# A sixth of the time, and memory within 5 %.
QUICK = {
    "exec_time_optimization_effort": -1.0,
    "memory_fitting_effort": -1.0,
}


def has_compiler():
    """Say whether the TPU's compiler is installed (Linux on x86-64 alone)."""
    return importlib.util.find_spec("libtpu") is not None


class Compiler:
    """A process that compiles steps: `with Compiler(job) as compiler`.

    Args:
        job: `Job`.
    """

    def __init__(self, job):
        self.job = job

    def __enter__(self):
        # A file: a pipe that nobody reads would fill up.
        self.told = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keras_paligemma.distribution.compiled"],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.told,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self.told.close()

    def compile(self, layout, remat, topology):
        """Compile one step.

        Args:
            layout: `Layout`.
            remat: `None`, "dots" or "block".
            topology: str, of `Machine`.

        Returns:
            Dict: `fits`; if so `arguments`, `temporaries`, `code` and
            `together` in bytes a chip; if not, `together` if it is known.
        """
        asked = {
            "job": dataclasses.asdict(self.job),
            "layout": dataclasses.asdict(layout),
            "remat": remat,
            "topology": topology,
        }
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.told.seek(0)
            raise RuntimeError(
                "The TPU's compiler stopped. Expected: jax and libtpu as in "
                f"keras-paligemma[plan]. It said: {self.told.read()[-2000:]}"
            )
        return json.loads(line)


def compile_step(job, layout, remat, topology):
    """Compile the step that `fit` runs for a topology; see `Compiler`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from keras_paligemma.compat import compiling_for
    from keras_paligemma.distribution.layouts import Sharded
    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM

    one_chip = {"chips_per_host_bounds": (1, 1, 1)}
    target = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        **(one_chip if topology.endswith(":1x1") else {}),
    )
    distribution = Sharded(layout, list(target.devices))
    backbone, optimizer = job.model(remat)
    model = PaliGemmaCausalLM(backbone, compile=False)
    model.compile(optimizer)

    def abstract(variables):
        return [
            jax.ShapeDtypeStruct(
                tuple(one.shape),
                one.dtype,
                sharding=distribution.get_variable_layout(one).backend_layout,
            )
            for one in variables
        ]

    # As Keras's trainer hands its state to `train_step`.
    state = (
        abstract(model.trainable_variables),
        abstract(model.non_trainable_variables),
        abstract(optimizer.variables),
        abstract(model.metrics_variables),
    )

    def given(shape, dtype):
        sharding = distribution.get_data_layout(shape).backend_layout
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)

    texts = (job.batch_size, job.text_length)
    answers = (job.batch_size, job.response_length)
    size = backbone.image_size
    data = (
        {
            "images": given((job.batch_size, size, size, 3), "float32"),
            "token_ids": given(texts, "int32"),
            "padding_mask": given(texts, "bool"),
            "response_mask": given(texts, "bool"),
        },
        given(answers, "int32"),
        given(answers, "float32"),
    )
    step = jax.jit(
        model.train_step,
        donate_argnums=0,
        out_shardings=(None, jax.tree.map(lambda one: one.sharding, state)),
    )
    with distribution.scope(), compiling_for("tpu"):
        lowered = step.lower(state, data)
    try:
        found = lowered.compile(compiler_options=QUICK).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([MG]) of", str(error))
        unit = {"M": 2**20, "G": 2**30}
        return {
            "fits": False,
            "together": used and float(used[1]) * unit[used[2]],
        }
    arguments = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    return {
        "fits": True,
        "arguments": arguments,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "together": arguments
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes,
    }


def main():
    """Compile what comes in, line by line."""
    from keras_paligemma.distribution.job import Job

    # Libraries that print must not come between.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            asked = json.loads(line)
            found = compile_step(
                Job(**asked["job"]),
                Layout(**asked["layout"]),
                asked["remat"],
                asked["topology"],
            )
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
