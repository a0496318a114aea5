"""Train a smaller preset on the answers of a larger one.

python examples/distil_answers.py examples/finetune/train.jsonl runs/distilled

Only the file's prompts are used, and not its answers.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.data import Batches
from keras_paligemma.data import JSONLSource
from keras_paligemma.training import fit


def write_answers(teacher, data, output, batch_size):
    """Write the file's examples again, with the teacher's answers."""
    lines = data.read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    images = [str((data.parent / row["image"]).resolve()) for row in rows]
    prompts = [row["prefix"] for row in rows]
    model = PaliGemmaCausalLM.from_preset(teacher)
    answers = model.generate(
        {"images": images, "prompts": prompts}, batch_size=batch_size
    )
    with output.open("w", encoding="utf-8") as file:
        for row in zip(images, prompts, answers, strict=True):
            keys = ("image", "prefix", "suffix")
            line = dict(zip(keys, row, strict=True))
            print(json.dumps(line, ensure_ascii=False), file=file)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="JSONL: image, prefix")
    parser.add_argument("output", type=Path, help="folder of the run")
    parser.add_argument("--teacher", default="pali_gemma2_nano_112")
    parser.add_argument("--student", default="pali_gemma2_nano_112")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)

    options.output.mkdir(parents=True, exist_ok=True)
    answers = options.output / "answers.jsonl"
    if not answers.exists():  # The teacher is freed before the student loads.
        write_answers(
            options.teacher, options.data, answers, options.batch_size
        )
    keras.utils.set_random_seed(0)
    model = PaliGemmaCausalLM.from_preset(options.student)
    model.enable_lora(16, targets="all")
    model.compile(Adam(options.learning_rate))
    source = JSONLSource(answers)
    batches = Batches(source, model.preprocessor, options.batch_size)
    fit(model, batches, options.output / "checkpoints", options.epochs)
    model.save_adapter(options.output / "adapter", base=options.student)


if __name__ == "__main__":
    main()
