"""Compiled functions of a model, one for each plan and shape."""

import contextlib
import os
from collections import OrderedDict

import keras
from keras import ops

from keras_paligemma.generation.recording import Recordings
from keras_paligemma.layers.cpu_products import answering_scope
from keras_paligemma.types import PathLike

# Programs that a model keeps. A new function as logits hook in each call means
# a new program in each call.
MOST_PROGRAMS = 32


def keep_compilations(folder: PathLike) -> None:
    """Keep compiled programs in a folder, for later processes.

    Args:
        folder: path; created if missing. Several processes may share it.

    Raises:
        ValueError: if the backend is not JAX; others have no such cache.

    Example:

    ```python
    keras_paligemma.keep_compilations("~/.cache/keras_paligemma/compiled")
    ```

    Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            "Only JAX keeps what it compiled. Received: the backend "
            f"{keras.backend.backend()!r}. Expected: 'jax'."
        )
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Programs:
    """The most recently used compiled functions of one model.

    On JAX, variables are arguments of the compiled function, so that the
    values of another adapter or a later step need no compilation.

    Args:
        model: `PaliGemmaCausalLM`; its `run_eagerly` and `jit_compile` apply.
    """

    def __init__(self, model):
        self._model = model
        self._compiled = OrderedDict()

    def __call__(self, function, plan, *arguments, donated=None):
        """Run a function, compiled on first use.

        Args:
            function: function of the model, `plan` and nests of tensors.
            plan: hashable, compile-time parameters of the program.
            *arguments: nests of arrays or tensors; ids int32, masks bool.
            donated: int, index of the argument that may be overwritten.
        """
        # TensorFlow does not trace again for variables that were added.
        key = function, plan, self._model.backbone.adapters.structure()
        if key not in self._compiled:
            compiled = _COMPILERS.get(keras.backend.backend(), _eagerly)
            if self._model.run_eagerly:
                compiled = _eagerly
            self._compiled[key] = compiled(self._model, function, plan, donated)
            if len(self._compiled) > MOST_PROGRAMS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        with answering_scope():
            return self._compiled[key][0](*arguments)

    def __len__(self):
        return len(self._compiled)

    def compilations(self):
        """Number of compilations of the programs that are kept.

        On Torch, of recordings; 0 where nothing is compiled.
        """
        return sum(count() for _, count in self._compiled.values())


def _eagerly(model, function, plan, donated):
    def run(*arguments):
        with _without_gradients():
            return function(model, plan, *_tensors(arguments))

    return run, lambda: 0


def _tensors(nest):
    """Convert arrays to tensors of the same dtypes, whatever floatx is."""
    return keras.tree.map_structure(
        lambda array: ops.convert_to_tensor(
            array, dtype=keras.backend.standardize_dtype(array.dtype)
        ),
        nest,
    )


def _without_gradients():
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _of_torch(model, function, plan, donated):
    recordings = Recordings(model)

    def run(*arguments):
        with _without_gradients(), recordings.scope():
            return function(model, plan, *_tensors(arguments))

    return run, recordings.__len__


def _of_jax(model, function, plan, donated):
    import jax

    def of_values(values, *arguments):
        # Freezing does not change the order of `variables`. A compiled
        # function is found by the shapes of its arguments alone.
        mapping = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function(model, plan, *arguments)

    numbers = () if donated is None else (donated + 1,)
    compiled = jax.jit(of_values, donate_argnums=numbers)

    # A compiled function places arrays of the host faster than Keras does.
    def run(*arguments):
        values = [variable.value for variable in model.variables]
        return compiled(values, *arguments)

    # JAX counts compilations, but its types do not declare the method.
    return run, compiled._cache_size  # pyright: ignore[reportAttributeAccessIssue]


def _of_tensorflow(model, function, plan, donated):
    import tensorflow as tf

    compiled = tf.function(
        lambda *arguments: function(model, plan, *arguments),
        jit_compile=model.jit_compile,
        # Model code branches with `keras.ops`. AutoGraph is not needed and
        # would take half of the time of a first call.
        autograph=False,
    )

    def run(*arguments):
        return compiled(*_tensors(arguments))

    return run, compiled.experimental_get_tracing_count


_COMPILERS = {
    "jax": _of_jax,
    "tensorflow": _of_tensorflow,
    "torch": _of_torch,
}
