"""Answer requests with only TensorFlow and tensorflow-text.

python served.py REQUESTS.pickle ANSWERS.pickle
"""

import pickle
import sys

# Block these imports: TensorFlow itself would try to import JAX.
ABSENT = ("keras_paligemma", "keras_hub", "jax", "torch", "sentencepiece")
sys.modules.update(dict.fromkeys(ABSENT))

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_text  # noqa: E402, F401  registers the tokenizer's operations


def main(requests, answers):
    with open(requests, "rb") as file:
        requests = pickle.load(file)
    loaded = {}
    results = {}
    for name, (folder, signature, inputs) in requests.items():
        if folder not in loaded:
            loaded[folder] = tf.saved_model.load(folder).signatures
        try:
            results[name] = ask(loaded[folder][signature], inputs)
        except (tf.errors.InvalidArgumentError, TypeError) as error:
            results[name] = {"raised": str(error)}
    results["imported"] = [module for module in ABSENT if sys.modules[module]]
    with open(answers, "wb") as file:
        pickle.dump(results, file)


def ask(function, inputs):
    inputs = {key: tf.constant(value) for key, value in inputs.items()}
    return {
        key: np.char.decode(value.numpy().astype("S"), "utf-8")
        if value.dtype == tf.string
        else value.numpy()
        for key, value in function(**inputs).items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
