"""The export formats, and the backend that writes each."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from typing import NamedTuple

from keras_paligemma.atomic import refuse_in_use
from keras_paligemma.atomic import whole_folder
from keras_paligemma.export import backend_process
from keras_paligemma.export import savedmodel
from keras_paligemma.types import PathLike

if TYPE_CHECKING:
    from keras_paligemma.models.causal_lm import PaliGemmaCausalLM


class Target(NamedTuple):
    """An export format.

    Fields:
        backend: Keras's name of the backend that writes it.
        packages: names of the modules that it needs.
        module, function: what writes it, within this package.
        entry: the last file of a complete folder.
        dtypes: supported compute dtypes and quantisations.
    """

    backend: str
    packages: tuple[str, ...]
    module: str
    function: str
    entry: str
    dtypes: tuple[str, ...] = ("float32",)


ONNX = ("torch", "onnx", "onnxscript")
TARGETS = {
    "stablehlo": Target(
        "jax",
        ("jax",),
        "stablehlo",
        "write",
        "generate.stablehlo",
        ("float32", "bfloat16", "int8", "int4"),
    ),
    "onnx": Target(
        "torch",
        ONNX,
        "onnx_files",
        "write",
        "model.onnx",
        ("float32", "int8", "int4"),
    ),
    "openvino": Target(
        "torch",
        (*ONNX, "openvino"),
        "onnx_files",
        "write_openvino",
        "model.xml",
        ("float32", "bfloat16"),
    ),
    "litert": Target(
        "tensorflow", ("tensorflow",), "litert", "write", "model.tflite"
    ),
}


def export(
    model: "PaliGemmaCausalLM", filepath: PathLike, format: str = "savedmodel"
) -> None:
    """Write a model as files that run without this package.

    "savedmodel" takes pictures and prompts and returns text; see
    `export.savedmodel`. The others take the preprocessor's arrays, with any
    batch size: "stablehlo" returns logits and generated ids, "onnx",
    "openvino" and "litert" return logits. Each format is written by one
    backend. On another backend, the model is written as a preset beside the
    target, and a process of the right backend exports that.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        filepath: str or path, a folder that is new or empty.
        format: "savedmodel", "stablehlo", "onnx", "openvino" or "litert".

    Raises:
        ValueError: an unknown format, a dtype that the format lacks, no
            preprocessor, or a folder in use.
        ImportError: a package that writes the format is not installed.
        RuntimeError: the other process failed; the message has its error
            output.

    Example:

    ```python
    model.export("served")
    model.export("for_onnx", format="onnx")
    ```
    """
    check_target(filepath, format)
    if model.preprocessor is None or model.preprocessor.image_converter is None:
        raise ValueError(
            "Pictures and prompts are read by the preprocessor. Received: a "
            "model without one, or without its image converter. Expected: "
            "one, as `from_preset` makes it."
        )
    if format in savedmodel.FORMATS:
        savedmodel.export(model, filepath)
        return
    _check_dtype(model.backbone, format)
    import keras

    backend = TARGETS[format].backend
    if keras.backend.backend() == backend:
        write(model, filepath, format)
    else:
        backend_process.write_in_backend(
            model, filepath, backend, __name__, format
        )


def check_target(filepath, format):
    """Check format, packages and folder before a model is loaded."""
    if format in savedmodel.FORMATS:
        savedmodel.check_target(filepath)
        return
    if format not in TARGETS:
        raise ValueError(
            f"Unknown format. Received: {format!r}. Expected: one of "
            f"{[savedmodel.FORMATS[0], *TARGETS]}."
        )
    for package in TARGETS[format].packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"An export to {format!r} needs {package}, which is not "
                "installed. Run: pip install 'keras_paligemma[targets]'."
            )
    refuse_in_use(filepath)


def _check_dtype(backbone, format):
    """Check that a format supports the model's dtype and quantisation."""
    dtypes = TARGETS[format].dtypes
    for dtype in (backbone.compute_dtype, backbone.quantization):
        if dtype is not None and dtype not in dtypes:
            raise ValueError(
                f"{format!r} has no {dtype}; docs/export_targets.md says why. "
                f"Received: a model of it. Expected: one of {[*dtypes]}. Load "
                "it with dtype='float32' and without `quantize`."
            )


def write(model, folder, format):
    """Write a model, on the backend that the format needs; see `export`."""
    target = TARGETS[format]
    module = importlib.import_module(f"keras_paligemma.export.{target.module}")
    with whole_folder(folder, target.entry) as draft:
        getattr(module, target.function)(model, draft)


def main(preset, folder, format):
    """Read a model and export it; runs in the process of the backend."""
    write(backend_process.read(preset), Path(folder), format)


if __name__ == "__main__":
    main(*sys.argv[1:])
