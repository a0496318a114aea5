"""Export a preset to each target of `model.export`, and compare the results.

    python -m benchmarks.targets [--preset NAME] [--dtype D] [--quantize Q]

A target is written by a process of its backend, and run by a process that has
only its runtime. Its results are compared with the model's: logits of given
answers on three pictures, as a share of the largest logit, and the texts of the
most probable tokens.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.export.targets import TARGETS

ROOT = Path(__file__).parents[1]
PICTURES = [ROOT / "examples" / "pictures" / f"scene_{n}.png" for n in range(3)]
PROMPTS = ["caption en", "answer en how many snail?", "detect snail"]
RESPONSES = ["a lion", "1", "<loc0012><loc0034><loc0100><loc0200> snail"]
RUNS = {
    "stablehlo": ["stablehlo"],
    "onnx": ["onnx"],
    "openvino": ["openvino"],
    "litert": ["litert", "litert_int8"],
}


def inputs_of(model):
    """Make the two input batches, with answers and without."""
    batch = {"images": PICTURES, "prompts": PROMPTS}
    scored, targets, _ = model.preprocessor(batch | {"responses": RESPONSES})
    asked = model.preprocessor.generate_preprocess(batch)
    logits = jax.jit(lambda x: model(x))(scored)
    logits = keras.ops.convert_to_numpy(logits[:, -targets.shape[1] - 1 : -1])
    arrays = {f"scored/{name}": value for name, value in scored.items()}
    arrays |= {f"asked/{name}": value for name, value in asked.items()}
    return arrays, logits.astype("float32"), model.generate(batch)


def texts_of(model, ids):
    """Convert ids to texts, up to their stop tokens."""
    stop = model.preprocessor.tokenizer.end_token_id
    goes_on = np.cumsum(ids == stop, axis=1) == 0
    ids = np.where(goes_on, ids, 0)
    return model.preprocessor.generate_postprocess({"token_ids": ids})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--dtype")
    parser.add_argument("--quantize")
    parser.add_argument("--only", choices=list(TARGETS))
    options = parser.parse_args()
    kind = {"dtype": options.dtype, "quantize": options.quantize}
    kind = {name: value for name, value in kind.items() if value}
    model = PaliGemmaCausalLM.from_preset(options.preset, **kind)
    arrays, logits, texts = inputs_of(model)
    weights = sum(
        variable.value.nbytes for variable in model.backbone.variables
    )
    print(f"weights {weights / 1e6:.2f} MB")
    print("target       seconds  of weights  logits      texts")
    alone = ROOT / "tests" / "export" / "alone.py"
    for format in [options.only] if options.only else TARGETS:
        with tempfile.TemporaryDirectory() as home:
            folder, inputs = Path(home) / "made", Path(home) / "inputs.npz"
            np.savez(inputs, **arrays)
            start = time.perf_counter()
            try:
                model.export(folder, format=format)
            except (RuntimeError, ValueError) as error:
                print(f"{format:12} {str(error)[-300:]}")
                continue
            seconds = time.perf_counter() - start
            for run in RUNS[format]:
                outputs = Path(home) / f"{run}.npz"
                told = subprocess.run(
                    [sys.executable, alone, run, folder, inputs, outputs],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                if told.returncode:
                    print(f"{run:12} {told.stderr[-300:]}")
                    continue
                with np.load(outputs) as file:
                    found = dict(file)
                ids = found.get("generated", found["ids"])
                right = sum(map(str.__eq__, texts_of(model, ids), texts))
                apart = np.abs(found["logits"] - logits).max()
                files = [
                    path.stat().st_size
                    for path in folder.iterdir()
                    if format != "litert" or path.stem == _file(run)
                ]
                print(
                    f"{run:12} {seconds:7.1f}  {sum(files) / weights:10.3f}  "
                    f"{apart / np.abs(logits).max():.1e}     "
                    f"{right} of {len(texts)}",
                    flush=True,
                )


def _file(run):
    return {"litert": "model", "litert_int8": "model_int8"}[run]


if __name__ == "__main__":
    main()
