"""Train detection on a YOLO folder and report the average precision.

python examples/finetune_yolo.py yolo runs/yolo
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.data import Batches
from keras_paligemma.data import check
from keras_paligemma.data import open_source
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.training import EvaluateObjects
from keras_paligemma.training import fit


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="folder with data.yaml or classes.txt")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument("--validation", default="val", help="its split")
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
    source = open_source(options.data)
    print(source)  # with what was clipped or left out
    held_out = open_source(options.data, split=options.validation)
    if problems := check(held_out):  # Precision would be of other pictures.
        parser.error("\n".join(problems))
    held_out = [*held_out]
    precision = EvaluateObjects(
        [example["images"] for example in held_out],
        [read_objects(example["responses"]) for example in held_out],
    )
    # Unreadable pictures are counted and skipped.
    batches = Batches(
        source, model.preprocessor, options.batch_size, skip_errors=True
    )
    model.enable_lora(8)
    model.compile(Adam(options.learning_rate))
    checkpoints = f"{options.output}/checkpoints"
    fit(
        model,
        batches,
        checkpoints,
        epochs=options.epochs,
        callbacks=[precision],
    )
    for epoch, values in precision.values.items():
        print(f"epoch {epoch}: mean average precision {values['map']:.3f}")
    model.save_adapter(f"{options.output}/adapter", base=options.preset)


if __name__ == "__main__":
    main()
