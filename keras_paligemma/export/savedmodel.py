"""A model as a TensorFlow SavedModel: pictures and prompts to text."""

import importlib.util
import sys

from keras_paligemma import atomic
from keras_paligemma.export import backend_process

ENTRY = "saved_model.pb"
FORMATS = ("savedmodel", "tf_saved_model")
# Characters by which a path stands for others.
PATTERNS = "*?[\\"


def export(model, filepath):
    """Write a model as a SavedModel, which TensorFlow serves without Python.

    It has four signatures. "serving_default" takes `images`, the bytes of
    JPEG, PNG, WebP or GIF files, and `prompts`, and returns `text`,
    `token_ids`, `tokens`, `log_probabilities` and `error` for each row.
    "batched" does the same without options, so that TensorFlow Serving and
    Triton can batch its requests. "generate" takes the preprocessor's arrays
    and returns `token_ids` and `log_probabilities`. "score" takes them with a
    response, and returns the log-probabilities of its tokens and the hidden
    states. Import `tensorflow_text` before loading it.

    "serving_default" and "generate" also take the options `max_new_tokens`,
    `temperature`, `top_k`, `top_p`, `min_p` and `seed`, and choose the same
    tokens as `model.generate`. The defaults are in the file: greedy decoding,
    up to the preprocessor's `response_length`.

    A model with named adapters also takes `adapter`: a name, or "" for the
    bare model; the active adapter is the default. A model with a merged
    adapter does not take it.

    Weights are stored once, in floats or low bits, with all adapters. On a
    backend other than TensorFlow, the model is written as a preset beside the
    target, and a TensorFlow process exports that.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        filepath: str or path, as `check_target` accepts it.

    Raises:
        ValueError: an adapter replaces whole weights.
        RuntimeError: the TensorFlow process failed; the message has its error
            output.

    Example:

    ```python
    model.export("served")

    import tensorflow as tf, tensorflow_text
    served = tf.saved_model.load("served")
    answer = served.signatures["serving_default"](
        images=tf.constant([open("cat.jpg", "rb").read()]),
        prompts=tf.constant(["caption en"]),
        max_new_tokens=tf.constant(20),
        temperature=tf.constant(0.7),
        top_k=tf.constant(model.backbone.vocabulary_size),
        top_p=tf.constant(0.9),
        min_p=tf.constant(0.0),
        seed=tf.constant(1),
    )
    ```
    """
    check_adapters(model.adapters)
    import keras

    if keras.backend.backend() == "tensorflow":
        variables = model.backbone.variables
        write(
            model,
            ((variable, variable.value) for variable in variables),
            filepath,
        )
    else:
        backend_process.write_in_backend(
            model, filepath, "tensorflow", __name__
        )


def check_adapters(adapters):
    """Check that requests can switch between a model's adapters."""
    names = [name for name in adapters.configs if adapters.whole(name)]
    if names and adapters.merged is None:
        raise ValueError(
            "A request chooses among adapters of low rank, on one base. "
            f"Received: {names}, which bring weights of the base whole. "
            "Export one that is merged: `adapters.select(name)`, "
            "`adapters.merge()`."
        )


def check_target(filepath):
    """Check packages and folder before a model is loaded.

    Args:
        filepath: str or path, a folder that is new or empty.

    Raises:
        ValueError: the folder is in use, or TensorFlow would take its path as
            a pattern.
        ImportError: TensorFlow or tensorflow-text is not installed.
    """
    for package in ("tensorflow", "tensorflow_text"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"An export needs {package}, which is not installed. Run: pip "
                "install 'keras_paligemma[export]'."
            )
    path = atomic.local(filepath).resolve().as_posix()
    found = [character for character in PATTERNS if character in path]
    if found:
        raise ValueError(
            "TensorFlow takes the path of a SavedModel as a pattern of file "
            f"names. Received: {path!r}, with {' '.join(found)}. Expected: a "
            f"path without any of {' '.join(PATTERNS)}."
        )
    atomic.refuse_in_use(filepath)


def write(model, values, folder):
    """Write a model of the TensorFlow backend; see `export`.

    Args:
        model: `PaliGemmaCausalLM`; its weights may lack values.
        values: iterable of pairs of a backbone variable and its value.
        folder: path of the target.
    """
    import tensorflow as tf

    from keras_paligemma.export import checkpoint
    from keras_paligemma.export.signatures import Answering

    module = Answering(model)
    with atomic.whole_folder(folder, ENTRY) as draft:
        tf.saved_model.save(module, str(draft), module.functions)
        checkpoint.write(
            str(draft / "variables" / "variables"), module.values(values)
        )


def main(preset, folder):
    """Read a model and export it; runs in the TensorFlow process."""
    write(*backend_process.read_in_parts(preset), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
