"""Run an exported forward pass with only NumPy and one runtime.

python alone.py FORMAT FOLDER INPUTS.npz OUTPUTS.npz
"""

import sys
from pathlib import Path

ABSENT = ["keras_paligemma", "keras_hub", "keras", "tensorflow", "torch"]
ABSENT.append("openvino_telemetry")  # Its telemetry package.
if sys.argv[1] != "stablehlo":
    ABSENT.append("jax")
sys.modules.update(dict.fromkeys(ABSENT))

import numpy as np  # noqa: E402


def stablehlo(folder):
    from jax import export
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")

    def read(name):
        return export.deserialize((folder / name).read_bytes())

    forward, generate = map(read, ("forward.stablehlo", "generate.stablehlo"))
    return (
        lambda inputs: forward.call(weights, inputs),
        lambda inputs: generate.call(weights, inputs),
    )


def onnx(folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return lambda inputs: session.run(["logits"], inputs)[0], None


def openvino(folder):
    import openvino

    # By default it uses half precision on processors that support it.
    model = openvino.Core().compile_model(
        folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda inputs: model(inputs)[0], None


def litert(folder, name="model.tflite"):
    from ai_edge_litert.interpreter import Interpreter

    # The interpreter keeps a view of the file until it is deleted.
    interpreter = Interpreter(str(folder / name), num_threads=1)
    run = interpreter.get_signature_runner()
    return lambda inputs: run(**inputs)["logits"], None


def litert_int8(folder):
    return litert(folder, "model_int8.tflite")


def answer(forward, inputs, responses):
    """Write each pass's most probable token into rows without a response."""
    inputs = {name: value.copy() for name, value in inputs.items()}
    prompt = inputs["token_ids"].shape[1] - responses
    for number in range(responses):
        here = (slice(None), prompt + number)
        logits = np.asarray(forward(inputs))
        inputs["token_ids"][here] = logits[:, number].argmax(-1)
        inputs["padding_mask"][here] = inputs["response_mask"][here] = True
    return inputs["token_ids"][:, prompt:]


def main(format, folder, inputs, outputs):
    forward, generate = globals()[format](Path(folder))
    with np.load(inputs) as file:
        arrays = dict(file)
    scored, asked = (
        {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        for prefix in ("scored/", "asked/")
    )
    logits = np.asarray(forward(scored))
    ids = answer(forward, asked, logits.shape[1])
    found = {"logits": logits, "ids": ids}
    if generate is not None:
        found["generated"] = np.asarray(generate(asked))
    np.savez(outputs, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
