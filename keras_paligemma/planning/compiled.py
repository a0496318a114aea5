"""Compile training and generation with the TPU's compiler, without a TPU.

Runs in a process of its own, since the compiler's environment must be set
before JAX starts: reads steps as JSON lines and writes the memory of each.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

from keras_paligemma.sharding.layouts import Layout

ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    # Allow several processes, and do not look for a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Compilation takes a sixth of the time; the memory differs by up to 5 %.
QUICK = {
    "exec_time_optimization_effort": -1.0,
    "memory_fitting_effort": -1.0,
}


def has_compiler():
    """Return whether the TPU's compiler is installed (Linux x86-64 only)."""
    return importlib.util.find_spec("libtpu") is not None


class Compiler:
    """A compiler process, used as `with Compiler() as compiler`."""

    def __enter__(self):
        # A file, since a pipe that is not read would fill up.
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "keras_paligemma.planning.compiled"],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def compile(self, job, layout, remat, topology, responses=None):
        """Compile a training step, or the program of `generate`.

        Args:
            job: `Job`.
            layout: `Layout`.
            remat: one of `layers.remat.REMATS`.
            topology: str, topology of a `Machine`.
            responses: int, tokens to generate; `None` for a training step.

        Returns:
            dict of `fits`; if it does, `arguments`, `temporaries`, `code` and
            their sum `together`, in bytes per chip; if it does not,
            `together`, which may be `None`.

        Raises:
            ImportError: the compiler stopped, and installed versions differ
                from those that the extra `plan` pins.
            RuntimeError: the compiler stopped for another reason.
        """
        asked = {
            "job": dataclasses.asdict(job),
            "layout": dataclasses.asdict(layout),
            "remat": remat,
            "topology": topology,
            "responses": responses,
        }
        # A stopped process is detected below, by the missing answer.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        # A pipe; a type checker cannot see this from `Popen`.
        line = self.process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        if not line:
            self.process.wait()
            self.log.seek(0)
            output = self.log.read()[-2000:]
            differing = other_versions()
            if differing:
                raise ImportError(
                    "The TPU's compiler does not work with the versions that "
                    f"are installed: {differing}. Install the extra in an "
                    "environment of its own, `python -m venv plan` and "
                    "`plan/bin/pip install 'keras_paligemma[plan]'`, and plan "
                    "there; or let arithmetic decide, by `--estimate` or "
                    f"`compiler=False`. It said: {output}"
                )
            raise RuntimeError(f"The TPU's compiler stopped. It said: {output}")
        return json.loads(line)


def other_versions():
    """Compare installed versions with those that the extra `plan` pins.

    Returns:
        str, such as "jax 0.12.0, expected 0.10.2"; "" if all are equal.
    """
    found = []
    for line in importlib.metadata.requires("keras_paligemma") or ():
        requirement, _, marker = line.partition(";")
        name, _, wanted = requirement.strip().partition("==")
        if not wanted or "'plan'" not in marker:
            continue
        installed = importlib.metadata.version(name)
        if installed != wanted:
            found.append(f"{name} {installed}, expected {wanted}")
    return "; ".join(found)


def compile_step(job, layout, remat, topology):
    """Compile the step of `fit` for a topology; see `Compiler`."""
    import jax

    model, distribution = _model(job, layout, remat, topology)
    optimizer = model.optimizer
    # The state as Keras's trainer passes it to `train_step`.
    state = (
        _abstract(distribution, model.trainable_variables),
        _abstract(distribution, model.non_trainable_variables),
        _abstract(distribution, optimizer.variables),
        _abstract(distribution, model.metrics_variables),
    )

    def given(shape, dtype):
        sharding = distribution.get_data_layout(shape).backend_layout
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = _inputs(job, model, job.response_length, given)
    targets = inputs["response_ids"]
    data = (inputs, targets, given(targets.shape, "float32"))
    step = jax.jit(
        model.train_step,
        donate_argnums=0,
        out_shardings=(None, jax.tree.map(lambda array: array.sharding, state)),
    )
    return _memory(_lowered(step, (state, data), distribution))


def compile_generation(job, layout, responses, topology):
    """Compile the program of `generate` for a topology; see `Compiler`."""
    return _memory(lower_generation(job, layout, responses, topology))


def lower_generation(job, layout, responses, topology):
    """Lower the program of `generate` for a topology.

    Prefill and decoding loop are one program; with `responses=1` it is only
    the prefill.
    """
    import jax
    import keras

    model, distribution = _model(job, layout, "block", topology)
    variables = model.trainable_variables + model.non_trainable_variables

    def program(inputs, values):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            # The end token is 1 in all PaliGemma tokenizers.
            return model.generate_step(inputs, (1,), job.cache_dtype)

    def given(shape, dtype):
        # As in `generate`: rows that do not divide are not split.
        if job.batch_size % layout.replicas:
            return jax.ShapeDtypeStruct(shape, dtype)
        sharding = distribution.get_data_layout(shape).backend_layout
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    inputs = _inputs(job, model, responses, given)
    values = _abstract(distribution, variables)
    return _lowered(jax.jit(program), (inputs, values), distribution)


def _model(job, layout, remat, topology):
    """Build a model without values, and its distribution over chips."""
    from jax.experimental import topologies

    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
    from keras_paligemma.sharding.layouts import Sharded

    one_chip = {"chips_per_host_bounds": (1, 1, 1)}
    target = topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        **(one_chip if topology.endswith(":1x1") else {}),
    )
    backbone, optimizer = job.model(remat)
    model = PaliGemmaCausalLM(backbone, compile=False)
    model.compile(optimizer)
    return model, Sharded(layout, list(target.devices))


def _inputs(job, model, response_length, given):
    """Return the model's inputs, each made by `given(shape, dtype)`."""
    prompts = (job.batch_size, job.prompt_length)
    responses = (job.batch_size, response_length)
    size = model.backbone.image_size
    return {
        "images": given(job.images_shape(size), "float32"),
        "prompt_ids": given(prompts, "int32"),
        "prompt_mask": given(prompts, "bool"),
        "response_ids": given(responses, "int32"),
        "response_mask": given(responses, "bool"),
    }


def _abstract(distribution, variables):
    """Return shape, dtype and sharding of variables, without values."""
    import jax

    return [
        jax.ShapeDtypeStruct(
            tuple(variable.shape),
            variable.dtype,
            sharding=distribution.get_variable_layout(variable).backend_layout,
        )
        for variable in variables
    ]


def _lowered(function, arguments, distribution):
    from keras_paligemma.compat import compiling_for

    with distribution.scope(), compiling_for("tpu"):
        return function.lower(*arguments)


def _memory(lowered):
    """Compile for the TPU, and return the compiler's memory analysis."""
    import jax

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
    """Compile each step that standard input describes, one per line."""
    from keras_paligemma.planning.job import Job

    # Libraries that print to standard output must not disturb the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            asked = json.loads(line)
            responses = asked["responses"]
            function = compile_generation if responses else compile_step
            found = function(
                Job(**asked["job"]),
                Layout(**asked["layout"]),
                responses or asked["remat"],
                asked["topology"],
            )
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
