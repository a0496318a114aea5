"""A process that has TensorFlow and tensorflow-text alone answers requests.

python served.py FOLDER REQUESTS.pickle ANSWERS.pickle
"""

import pickle
import sys

# They cannot be imported: TensorFlow itself would try JAX.
ABSENT = ("keras_paligemma", "keras_hub", "jax", "torch", "sentencepiece")
sys.modules.update(dict.fromkeys(ABSENT))

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_text  # noqa: E402, F401  registers the tokenizer's operations


def main(folder, requests, answers):
    signatures = tf.saved_model.load(folder).signatures
    with open(requests, "rb") as file:
        requests = pickle.load(file)
    results = {}
    for name, (signature, inputs) in requests.items():
        inputs = {key: tf.constant(value) for key, value in inputs.items()}
        outputs = signatures[signature](**inputs)
        results[name] = {
            key: np.array([one.decode() for one in value.numpy()])
            if value.dtype == tf.string
            else value.numpy()
            for key, value in outputs.items()
        }
    results["imported"] = [one for one in ABSENT if sys.modules[one]]
    with open(answers, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
