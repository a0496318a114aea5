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
from keras_paligemma.data.examples import located
from keras_paligemma.preprocessing.images import is_uri
from keras_paligemma.preprocessing.images import picture_path
from keras_paligemma.training import fit


def read_questions(data, teacher):
    """Return the file's examples as they are kept, without an answer."""
    source, questions = JSONLSource(data), []
    for number in range(len(source)):
        with located(source.where(number)):
            row = source.record(number)
            questions.append(
                {
                    "image": absolute(row["image"], data.parent),
                    "prefix": row["prefix"],
                    "teacher": teacher,
                }
            )
    return questions


def absolute(image, folder):
    """Return a picture's absolute path, or its URI; of frames, a list."""
    if isinstance(image, list):
        return [absolute(frame, folder) for frame in image]
    path = picture_path(image, str(folder))
    return path if is_uri(path) else str(Path(path).resolve())


def write_answers(teacher, questions, output, batch_size):
    """Write the questions with the teacher's answers, all or none."""
    inputs = {
        "images": [row["image"] for row in questions],
        "prompts": [row["prefix"] for row in questions],
    }
    model = PaliGemmaCausalLM.from_preset(teacher)
    answers = model.generate(inputs, batch_size=batch_size)
    draft = output.with_name(f".{output.name}")
    with draft.open("w", encoding="utf-8") as file:
        for row, answer in zip(questions, answers, strict=True):
            line = json.dumps(row | {"suffix": answer}, ensure_ascii=False)
            print(line, file=file)
    draft.replace(output)


def are_answered(questions, output):
    """Return whether a file has answers to these questions."""
    lines = output.read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    unanswered = {"suffix": None}
    asked = [row | unanswered for row in rows]
    return asked == [row | unanswered for row in questions]


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
    questions = read_questions(options.data, options.teacher)
    if not answers.exists():  # The teacher is freed before the student loads.
        write_answers(options.teacher, questions, answers, options.batch_size)
    elif not are_answered(questions, answers):
        parser.error(
            f"{answers} has answers to other questions or of another teacher"
        )
    keras.utils.set_random_seed(0)
    model = PaliGemmaCausalLM.from_preset(options.student)
    model.enable_lora(16, targets="all")
    model.compile(Adam(options.learning_rate))
    # A teacher may find nothing, or write half a box, which is skipped.
    source = JSONLSource(answers, allow_empty=True)
    batches = Batches(
        source, model.preprocessor, options.batch_size, skip_errors=True
    )
    fit(model, batches, options.output / "checkpoints", options.epochs)
    model.save_adapter(options.output / "adapter", base=options.student)


if __name__ == "__main__":
    main()
