"""Train detection on a COCO file.

python examples/finetune_coco.py instances.json pictures runs/coco
"""

import argparse
import contextlib
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.data import Batches
from keras_paligemma.data import COCOSource
from keras_paligemma.data import ExampleError
from keras_paligemma.data import check
from keras_paligemma.training import SamplePredictions
from keras_paligemma.training import fit


def first_readable(source, count):
    """Return the first examples without an error."""
    found = []
    for number in range(len(source)):
        with contextlib.suppress(ExampleError):
            example = source[number]
            found += [] if check([example]) else [example]
        if len(found) == count:
            break
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("annotations", help="COCO's JSON of boxes")
    parser.add_argument("images", help="folder of its pictures")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--response-length", type=int, default=128, help="tokens of all boxes"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    keras.utils.set_random_seed(0)
    model = PaliGemmaCausalLM.from_preset(
        options.preset, response_length=options.response_length
    )
    source = COCOSource(options.annotations, options.images)
    print(source)  # with what was clipped or left out
    # Unreadable pictures are counted and skipped.
    batches = Batches(
        source, model.preprocessor, options.batch_size, skip_errors=True
    )
    model.enable_lora(8)
    model.compile(Adam(options.learning_rate))
    seen = first_readable(source, 4)
    samples = {
        key: [example[key] for example in seen]
        for key in ("images", "prompts", "responses")
    }
    fit(
        model,
        batches,
        f"{options.output}/checkpoints",
        epochs=options.epochs,
        callbacks=[SamplePredictions(samples, f"{options.output}/samples")],
    )
    model.save_adapter(f"{options.output}/adapter", base=options.preset)


if __name__ == "__main__":
    main()
