"""A model as a SavedModel of TensorFlow: pictures and prompts in, text out."""

import importlib.util
import sys

from keras_paligemma.atomic import refuse_in_use
from keras_paligemma.atomic import whole_folder
from keras_paligemma.export import backend_process

ENTRY = "saved_model.pb"
FORMATS = ("savedmodel", "tf_saved_model")


def export(model, filepath, format="savedmodel"):
    """Write a model as a folder that TensorFlow serves.

    Its signatures read no Python: "serving_default" takes `images`, the bytes
    of JPEG, PNG, WebP or GIF, and `prompts`, and gives `text`, `token_ids`,
    `log_probabilities` and `error`, one of each a row; "generate" takes the
    preprocessor's arrays and gives ids; "score" takes them with a response,
    and gives the logarithms of its probabilities and the hidden states.
    `max_new_tokens` and `temperature` have defaults, the preprocessor's
    `response_length` and 0. Whoever loads it imports `tensorflow_text` first.

    A model with named adapters also takes `adapter`: a name, "" for the bare
    model; the one in use if it is not given. One that is merged takes none.

    Weights are stored once, as they are: floats or few bits, all adapters
    beside them. On a backend other than TensorFlow the model is written as a
    preset beside the target, and a process of TensorFlow exports that.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        filepath: str or path of a folder that is new or empty.
        format: "savedmodel".

    Raises:
        ValueError: another format, no preprocessor, a folder in use.
        ImportError: TensorFlow or tensorflow-text are not installed.
        RuntimeError: the process of TensorFlow stopped; with what it said.

    Example:

    ```python
    model.export("served")

    import tensorflow as tf, tensorflow_text
    served = tf.saved_model.load("served")
    answer = served.signatures["serving_default"](
        images=tf.constant([open("cat.jpg", "rb").read()]),
        prompts=tf.constant(["caption en"]),
        max_new_tokens=tf.constant(20),
        temperature=tf.constant(0.0),
    )
    ```
    """
    check_target(filepath, format)
    check_preprocessor(model)
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


def check_preprocessor(model):
    """Refuse a model that cannot read pictures and prompts."""
    if model.preprocessor is None or model.preprocessor.image_converter is None:
        raise ValueError(
            "Pictures and prompts are read by the preprocessor. Received: a "
            "model without one, or without its image converter. Expected: "
            "one, as `from_preset` makes it."
        )


def check_adapters(adapters):
    """Refuse what a request could not switch."""
    names = [name for name in adapters.configs if adapters.whole(name)]
    if names and adapters.merged is None:
        raise ValueError(
            "A request chooses among adapters of low rank, on one base. "
            f"Received: {names}, which bring weights of the base whole. "
            "Export one that is merged: `adapters.select(name)`, "
            "`adapters.merge()`."
        )


def check_target(filepath, format="savedmodel"):
    """Refuse what cannot be exported, before a model is read."""
    if format not in FORMATS:
        raise ValueError(
            f"Unknown format. Received: {format!r}. Expected: {FORMATS[0]!r}."
        )
    for package in ("tensorflow", "tensorflow_text"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"An export needs {package}, which is not installed. Run: pip "
                "install 'keras_paligemma[export]'."
            )
    refuse_in_use(filepath)


def write(model, values, folder):
    """Write a model of the TensorFlow backend; see `export`.

    Args:
        model: `PaliGemmaCausalLM`, whose weights need no values.
        values: iterable of pairs of a variable of the backbone and its value.
        folder: path of the target.
    """
    import tensorflow as tf

    from keras_paligemma.export import checkpoint
    from keras_paligemma.export.signatures import Answering

    module = Answering(model)
    with whole_folder(folder, ENTRY) as draft:
        tf.saved_model.save(module, str(draft), module.functions)
        checkpoint.write(
            str(draft / "variables" / "variables"), module.values(values)
        )


def main(preset, folder):
    """Read a model and export it: the process that has TensorFlow."""
    write(*backend_process.read_in_parts(preset), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
